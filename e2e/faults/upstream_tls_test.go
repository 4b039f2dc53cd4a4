//go:build faults

package faults

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/testca"
)

// tlsFaults are those of an upstream that proves badly who it is.
var tlsFaults = []fault{
	{name: "a certificate of an unknown authority", outcome: "502 `connection`, tried once; nothing is sent",
		run: untrusted("unknown authority", func(s *scene, _ *testca.Authority) *tls.Config {
			other, _ := s.Authority()
			return s.proves(other, nil)
		})},
	{name: "an expired certificate", outcome: "502 `connection`, tried once; nothing is sent",
		run: untrusted("expired", func(s *scene, ca *testca.Authority) *tls.Config {
			return s.proves(ca, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
		})},
	{name: "a certificate for another name", outcome: "502 `connection`, tried once; nothing is sent",
		run: untrusted("127.0.0.1", func(s *scene, ca *testca.Authority) *tls.Config {
			return s.proves(ca, func(c *x509.Certificate) { c.IPAddresses = nil })
		})},
	{name: "TLS 1.0 only", outcome: "502 `connection`; nothing is sent",
		run: untrusted("protocol version", func(s *scene, ca *testca.Authority) *tls.Config {
			config := s.proves(ca, nil)
			config.MinVersion, config.MaxVersion = tls.VersionTLS10, tls.VersionTLS10
			return config
		})},
	{name: "a handshake that never ends", outcome: "502 `connection` after `connect_timeout_secs` (5 s), tried once; nothing is sent",
		run: untrusted("TLS handshake", func(s *scene, _ *testca.Authority) *tls.Config {
			return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				<-s.Context().Done() // when the test ends
				return nil, io.EOF
			}}
		})},
}

// proves returns a configuration with a certificate of ca's, after spoil, if not nil, has made of it what it likes.
func (s *scene) proves(ca *testca.Authority, spoil func(*x509.Certificate)) *tls.Config {
	s.Helper()
	return &tls.Config{Certificates: []tls.Certificate{proxytest.Must(ca.Certificate(spoil))(s.T)}}
}

// untrusted runs an upstream whose TLS the proxy must refuse, and then one that is as it should be.
func untrusted(err string, bad func(*scene, *testca.Authority) *tls.Config) func(*scene) {
	return func(s *scene) {
		ca, env := s.Authority()
		good := s.proves(ca, nil)
		var config atomic.Pointer[tls.Config]
		config.Store(bad(s, ca))
		var served atomic.Int32
		up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { served.Add(1) }))
		up.Config.ErrorLog = log.New(io.Discard, "", 0)
		up.TLS = &tls.Config{
			Certificates:       good.Certificates, // httptest adds its own to none
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return config.Load(), nil },
		}
		up.StartTLS()
		s.Cleanup(up.Close)
		s.HangUp = up.CloseClientConnections
		s.Start(up.URL, "", env)
		s.Refused(s.Post(), 502, "connection", -1, err)
		if served.Load() > 0 {
			s.Error("a request reached the untrusted upstream")
		}
		config.Store(good)
		s.Passed(s.Get("/"), 200, "", 1)
	}
}
