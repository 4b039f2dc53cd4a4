// Package fakeanthropic is a stand-in for Anthropic's API on loopback: real TLS with a certificate authority of its own, HTTP/1.1
// or HTTP/2, the API's answers, event streams and errors, and a record of every request that arrived.
//
// What it answers is an [http.Handler] that a test can exchange at any time: [API]
// by default, or one of the misbehaving ones in behave.go, or the test's own.
package fakeanthropic

import (
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

// A Server is a running fake API. Create it with [Start].
type Server struct {
	URL    string // such as https://127.0.0.1:41234, without a slash at its end
	CAFile string // PEM file for SSL_CERT_FILE; it exists until Close; empty for Plaintext

	http    http.Server
	handler atomic.Pointer[http.Handler]
	dir     string

	forgets atomic.Bool

	mu       sync.Mutex
	conns    map[net.Conn]bool
	requests []*record
}

// PlainPath is answered with "plain" by every server, whatever its handler, and not recorded: it shows that requests get through.
const PlainPath = "/plain"

// Start runs a server on a free port of 127.0.0.1. A nil handler is [API].
func Start(protocol Protocol, handler http.Handler) (*Server, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("starting the fake API: %w", err)
	}
	return StartOn(listener, protocol, handler)
}

// StartOn is Start on a listener, at whose address others find it; it is closed in the end.
func StartOn(listener net.Listener, protocol Protocol, handler http.Handler) (*Server, error) {
	s := &Server{URL: "http://" + listener.Addr().String(), conns: map[net.Conn]bool{}}
	s.Handle(handler)
	s.http.Handler = http.HandlerFunc(s.serve)
	s.http.DisableGeneralOptionsHandler = true // OPTIONS * must reach the handler
	s.http.ConnState = s.account
	s.http.ErrorLog = log.New(io.Discard, "", 0) // clients that leave are part of the game
	if protocol == Plaintext {
		go s.http.Serve(listener) // returns when Close is called
		return s, nil
	}
	if err := s.secure(protocol, listener.Addr().(*net.TCPAddr).IP); err != nil {
		return nil, errors.Join(fmt.Errorf("starting the fake API: %w", err), listener.Close(), s.Close())
	}
	go s.http.ServeTLS(listener, "", "") // as above
	return s, nil
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

// account keeps account of the connections.
func (s *Server) account(conn net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch state {
	case http.StateNew:
		s.conns[conn] = true
	case http.StateClosed, http.StateHijacked:
		delete(s.conns, conn)
	}
}

// ClientPorts returns the clients' ends of the connections that there are.
func (s *Server) ClientPorts() (ports []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		_, port, _ := net.SplitHostPort(conn.RemoteAddr().String())
		ports = append(ports, port)
	}
	return ports
}

// HangUp cuts the connections that there are.
func (s *Server) HangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.conns {
		conn.Close()
	}
}

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

// Forget has the server record no requests from now on: those of half an hour are too many.
func (s *Server) Forget() { s.forgets.Store(true) }

// Close cuts all connections and frees everything.
func (s *Server) Close() error {
	return errors.Join(s.http.Close(), os.RemoveAll(s.dir))
}

// serve records the request and lets the present handler answer it.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == PlainPath {
		io.WriteString(w, "plain")
		return
	}
	if !s.forgets.Load() {
		rec := newRecord(r)
		s.mu.Lock()
		s.requests = append(s.requests, rec)
		s.mu.Unlock()
	}
	(*s.handler.Load()).ServeHTTP(w, r)
}

// Requests returns what has arrived so far, in order of arrival.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Request, len(s.requests))
	for i, rec := range s.requests {
		all[i] = rec.snapshot()
	}
	return all
}
