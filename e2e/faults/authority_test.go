//go:build faults

package faults

import (
	"crypto/tls"
	"crypto/x509"
	"net"

	"anthropic-oauth-proxy/e2e/testca"
)

// An authority signs certificates that a scene's proxy trusts.
type authority struct {
	*testca.Authority
	s    *scene
	file string // PEM
}

func newAuthority(s *scene) *authority {
	s.Helper()
	ca, err := testca.New()
	if err != nil {
		s.Fatal(err)
	}
	return &authority{Authority: ca, s: s, file: s.tempFile(ca.PEM)}
}

// env makes the proxy trust the authority.
func (a *authority) env() string { return "SSL_CERT_FILE=" + a.file }

// certificate returns a good certificate for an upstream on this machine or in its
// namespaces, after spoil, if not nil, has made of it what it likes.
func (a *authority) certificate(spoil func(*x509.Certificate)) tls.Certificate {
	a.s.Helper()
	certificate, err := a.Certificate(func(c *x509.Certificate) {
		c.DNSNames = append(c.DNSNames, "upstream.test")
		c.IPAddresses = append(c.IPAddresses, net.IPv4(192, 0, 2, 2))
		if spoil != nil {
			spoil(c)
		}
	})
	if err != nil {
		a.s.Fatal(err)
	}
	return certificate
}
