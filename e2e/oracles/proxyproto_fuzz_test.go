package oracles

import (
	"bufio"
	"bytes"
	"net"
	"net/netip"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"

	"github.com/pires/go-proxyproto"
)

// FuzzProxyProtocol holds the parser of PROXY headers against tailscaled's own library for them. What it takes, the other must
// take as the same client; what the other takes and would write itself, it must take; and until a header is whole it must wait.
func FuzzProxyProtocol(f *testing.F) {
	for _, version := range []byte{1, 2} {
		for family, hosts := range map[proxyproto.AddressFamilyAndProtocol][2]string{
			proxyproto.TCPv4: {"100.64.0.7:41000", "100.64.0.1:8082"}, proxyproto.TCPv6: {"[fd7a:115c:a1e0::7]:1", "[::1]:65535"}, proxyproto.UNSPEC: {},
		} {
			h := &proxyproto.Header{Version: version, Command: proxyproto.PROXY, TransportProtocol: family}
			if family == proxyproto.UNSPEC {
				h.Command = proxyproto.LOCAL
			} else {
				h.SourceAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(hosts[0]))
				h.DestinationAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(hosts[1]))
			}
			text := proxytest.Must(h.Format())(f)
			f.Add(append(text, "POST / HTTP/1.1\r\n"...))
		}
	}
	f.Add([]byte("PROXY TCP6 ::ffff:1.2.3.4 fe80::1%eth0 08080 +1\r\n"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c123456789012"))
	parser := startServed(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) == 0 {
			return
		}
		got := parseProxied(t, parser, b)
		h, oracleErr := proxyproto.Read(bufio.NewReaderSize(bytes.NewReader(b), 1<<17))
		switch {
		case len(got.Errors) == 0 && got.Size > 0:
			for _, part := range []int{1, 6, got.Size / 2, got.Size - 1} {
				if early := parseProxied(t, parser, b[:max(1, min(part, got.Size-1))]); len(early.Errors) > 0 || early.Size > 0 {
					t.Errorf("of %q, %d bytes are enough for %+v", b, part, early)
				}
			}
			if oracleErr != nil && got.Client != "" {
				t.Errorf("took %q for a header of %s, the oracle says %v", b, got.Client, oracleErr)
			} else if client := clientOf(h); got.Client != client {
				t.Errorf("took %q for a header of %q, the oracle for one of %q", b, got.Client, client)
			}
		case oracleErr == nil:
			if text, err := h.Format(); err == nil && bytes.HasPrefix(b, text) && len(text) <= 1<<10 {
				t.Errorf("refused %q (%+v), which the oracle would have written", b, got)
			}
		}
	})
}

type proxied struct {
	Errors []string
	Client string
	Size   int
}

func parseProxied(t *testing.T, parser *served, b []byte) (answer proxied) {
	t.Helper()
	parser.ask(t, map[string]any{"proxied": b}, &answer)
	return answer
}

// clientOf returns who the oracle says is behind a TCP connection, "" if its header does not say.
func clientOf(h *proxyproto.Header) string {
	if h == nil || h.Command.IsLocal() || !h.TransportProtocol.IsStream() {
		return ""
	}
	client, ok := h.SourceAddr.(*net.TCPAddr)
	if !ok {
		return ""
	}
	ap := client.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}
