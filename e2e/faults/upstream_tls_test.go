//go:build faults

package faults

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"time"
)

// tlsFaults are those of an upstream that proves badly who it is.
var tlsFaults = []fault{
	{name: "a certificate of an unknown authority", outcome: "502 `connection`, tried once; nothing is sent", run: func(s *scene) {
		s.untrusted(func(*authority) *tls.Config {
			return &tls.Config{Certificates: []tls.Certificate{newAuthority(s).certificate(nil)}}
		}, "unknown authority")
	}},
	{name: "an expired certificate", outcome: "502 `connection`, tried once; nothing is sent", run: func(s *scene) {
		s.untrusted(func(ca *authority) *tls.Config {
			return &tls.Config{Certificates: []tls.Certificate{ca.certificate(func(c *x509.Certificate) {
				c.NotAfter = time.Now().Add(-time.Hour)
			})}}
		}, "expired")
	}},
	{name: "a certificate for another name", outcome: "502 `connection`, tried once; nothing is sent", run: func(s *scene) {
		s.untrusted(func(ca *authority) *tls.Config {
			return &tls.Config{Certificates: []tls.Certificate{ca.certificate(func(c *x509.Certificate) {
				c.IPAddresses = nil
			})}}
		}, "127.0.0.1")
	}},
	{name: "TLS 1.0 only", outcome: "502 `connection`; nothing is sent", run: func(s *scene) {
		s.untrusted(func(ca *authority) *tls.Config {
			return &tls.Config{
				Certificates: []tls.Certificate{ca.certificate(nil)},
				MinVersion:   tls.VersionTLS10, MaxVersion: tls.VersionTLS10,
			}
		}, "protocol version")
	}},
	{name: "a handshake that never ends", outcome: "502 `connection` after `connect_timeout_secs` (5 s), tried once; nothing is sent", run: func(s *scene) {
		ends := make(chan struct{})
		s.untrusted(func(*authority) *tls.Config {
			return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { <-ends; return nil, io.EOF }}
		}, "TLS handshake")
		close(ends)
	}},
}

// untrusted runs an upstream whose TLS the proxy must refuse, and then one that is
// as it should be.
func (s *scene) untrusted(bad func(ca *authority) *tls.Config, err string) {
	s.Helper()
	ca, served := newAuthority(s), 0
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served++
		io.WriteString(w, "plain")
	}))
	good := &tls.Config{Certificates: []tls.Certificate{ca.certificate(nil)}}
	config := bad(ca)
	up.Config.ErrorLog = log.New(io.Discard, "", 0)
	up.TLS = &tls.Config{
		Certificates:       good.Certificates, // httptest adds its own to none
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config, nil },
	}
	up.StartTLS()
	s.Cleanup(up.Close)
	s.hangUp = up.CloseClientConnections
	s.start(up.URL, "", ca.env())
	s.refused(s.post(), 502, "connection", -1, err)
	if served > 0 {
		s.Error("a request reached the untrusted upstream")
	}
	s.mend = func() { config = good }
}
