// Package fakeanthropic is a stand-in for Anthropic's API on loopback: real TLS
// with a certificate authority of its own, HTTP/1.1 or HTTP/2, the API's answers,
// event streams and errors, and a record of every request that arrived.
//
// What it answers is an [http.Handler] that a test can exchange at any time: [API]
// by default, or one of the misbehaving ones in behave.go, or the test's own.
package fakeanthropic

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"anthropic-oauth-proxy/e2e/testca"
)

// Protocol is what a server speaks.
type Protocol int

// The protocols that a server can speak.
const (
	HTTP2     Protocol = iota // over TLS, and nothing else, as Anthropic's edge does for a Go client
	HTTP1                     // HTTP/1.1 over TLS
	Plaintext                 // HTTP/1.1 without TLS
)

func (p Protocol) String() string {
	return [...]string{"HTTP2", "HTTP1", "Plaintext"}[p]
}

// loopback is where servers listen unless told otherwise.
const loopback = "127.0.0.1"

// A Server is a running fake API. Create it with [Start].
type Server struct {
	URL    string // such as https://127.0.0.1:41234, without a slash at its end
	CAFile string // PEM file for SSL_CERT_FILE; it exists until Close; empty for Plaintext

	http    http.Server
	handler atomic.Pointer[http.Handler]
	dir     string
	conns   atomic.Int32 // accepted so far

	mu       sync.Mutex
	requests []*record
}

// Start runs a server on a free port of 127.0.0.1. A nil handler is [API].
func Start(protocol Protocol, handler http.Handler) (*Server, error) {
	return StartAt(net.JoinHostPort(loopback, "0"), protocol, handler)
}

// StartAt is Start at an address of this machine, such as 10.254.0.1:0, at
// which pods or other machines find it.
func StartAt(address string, protocol Protocol, handler http.Handler) (*Server, error) {
	s := new(Server)
	s.Handle(handler)
	s.http.Handler = http.HandlerFunc(s.serve)
	s.http.DisableGeneralOptionsHandler = true // OPTIONS * must reach the handler
	return s, s.start(address, protocol)
}

// start listens and serves.
func (s *Server) start(address string, protocol Protocol) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("starting the fake API: %w", err)
	}
	s.URL = "http://" + listener.Addr().String()
	s.http.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			s.conns.Add(1)
		}
	}
	s.http.ErrorLog = log.New(io.Discard, "", 0) // clients that leave are part of the game
	if protocol == Plaintext {
		go s.http.Serve(listener) // it returns when Close is called
		return nil
	}
	if err := s.secure(protocol, listener.Addr().(*net.TCPAddr).IP); err != nil {
		return errors.Join(fmt.Errorf("starting the fake API: %w", err), listener.Close(), s.Close())
	}
	go s.http.ServeTLS(listener, "", "") // as above
	return nil
}

// secure makes a certificate authority and lets the server speak the protocol
// over TLS only. Its certificate is for the address ip too.
func (s *Server) secure(protocol Protocol, ip net.IP) error {
	authority, err := testca.New()
	if err != nil {
		return err
	}
	certificate, err := authority.Certificate(func(c *x509.Certificate) { c.IPAddresses = append(c.IPAddresses, ip) })
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "fakeanthropic-"); err != nil {
		return err
	}
	s.URL = "https" + s.URL[len("http"):]
	s.CAFile = filepath.Join(s.dir, "ca.pem")
	s.http.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{certificate}}
	s.http.Protocols = new(http.Protocols)
	s.http.Protocols.SetHTTP1(protocol == HTTP1)
	s.http.Protocols.SetHTTP2(protocol == HTTP2)
	return os.WriteFile(s.CAFile, authority.PEM, 0o644)
}

// Connections returns how many connections were opened so far.
func (s *Server) Connections() int { return int(s.conns.Load()) }

// Env returns what a client's environment needs in order to trust the server.
func (s *Server) Env() []string {
	if s.CAFile == "" {
		return nil
	}
	return []string{"SSL_CERT_FILE=" + s.CAFile}
}

// Handle answers requests that arrive from now on with h; nil is [API].
func (s *Server) Handle(h http.Handler) {
	if h == nil {
		h = API{}
	}
	s.handler.Store(&h)
}

// Close cuts all connections and frees everything.
func (s *Server) Close() error {
	return errors.Join(s.http.Close(), os.RemoveAll(s.dir))
}

// serve records the request and lets the present handler answer it.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	rec := newRecord(r)
	s.mu.Lock()
	s.requests = append(s.requests, rec)
	s.mu.Unlock()

	stop := context.AfterFunc(r.Context(), rec.cancelled)
	defer rec.ended()
	defer func() {
		stop() // before net/http cancels the context of a finished request
		if r.Context().Err() != nil {
			rec.cancelled() // the handler may have been told first
		}
	}()
	(*s.handler.Load()).ServeHTTP(w, r)
}

// Requests returns what has arrived so far, in order of arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Request, len(s.requests))
	for i, rec := range s.requests {
		all[i] = rec.snapshot(i)
	}
	return all
}
