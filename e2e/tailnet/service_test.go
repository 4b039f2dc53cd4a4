package tailnet_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// launchService runs the proxy beside a node, for callers from the tailnet only, and returns where it expects PROXY headers.
func (f *fixture) launchService(n *tailnet.Node, listen string) (addr string) {
	f.Helper()
	p := f.running(n, fmt.Sprintf("[proxy]\nrequire_tailnet = true\nproxy_protocol_addr = %q", listen))
	return proxytest.WaitLog(f.T, p, proxytest.MsgRunning).Text("proxy_protocol_addr")
}

// TestService: one name, of which each host answers while it is its turn, and knows who calls. The hosts are tagged nodes that each
// tell their proxy of the callers in another version of the PROXY header. e2e/cluster has clients at work while hosts come and go.
func TestService(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	addr6 := netip.MustParseAddr("fd7a:115c:a1e0::99")
	s := f.tailnet.Control.Offer(t.Context(), "claude", netip.MustParseAddr("100.99.0.1"), addr6)
	hosts, proxies := map[string]*tailnet.Node{}, map[string]*proxytest.Proxy{}
	for version := range 2 {
		n := f.newNode(fmt.Sprint("claude-", version), "tag:claude")
		f.connect(n)
		addr := f.launchService(n, "127.0.0.2:0")
		f.do(n.Tailscale(t.Context(), "serve", "--service="+string(s.Name), "--tcp=8080",
			fmt.Sprint("--proxy-protocol=", version+1), "tcp://"+addr))
		hosts[n.Name], proxies[n.Name] = n, f.Proxy
	}
	laptop, c := f.client("laptop")
	user := f.self(laptop).User
	for served := ""; len(hosts) > 0; c.CloseIdleConnections() {
		proxytest.Eventually(t, "another host than "+served, func() bool {
			all, routed := s.Hosts()
			return len(all) == len(hosts) && hosts[routed] != nil && laptop.Route(t.Context(), addr6) == routed
		})
		_, served = s.Hosts()
		for _, base := range []string{"http://claude." + tailnet.Domain + ":8080", "http://[" + addr6.String() + "]:8080"} {
			if a := f.post(c, base); a.StatusCode != http.StatusOK { // at once or not: new connections through SOCKS may stall
				t.Errorf("%s at %s: status %d: %s", base, served, a.StatusCode, a.Text)
			}
		}
		p := proxies[served]
		proxytest.Eventually(t, "both requests are logged", func() bool { return len(completed(p)) == 2 })
		for _, line := range completed(p) {
			if line.Text("tailnet_node") != "laptop."+tailnet.Domain || line.Text("tailnet_user") != user {
				t.Errorf("%s: a request of laptop's is logged as %s", served, line.Raw)
			}
		}
		f.do(hosts[served].Tailscale(t.Context(), "serve", "drain", string(s.Name)))
		delete(hosts, served)
	}
}

// TestForgedIdentity: a peer that reaches the port of the PROXY listener directly, through a userspace tailscaled, which
// hands it on to loopback.
func TestForgedIdentity(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.connect(f.sidecar)
	victim, _ := f.client("victim")
	attacker, _ := f.client("attacker")
	target := f.self(f.sidecar).IP
	for addr, refusal := range map[string]string{
		"127.0.0.1:0": "forgery by attacker." + tailnet.Domain,
		// tailscaled hands on to 127.0.0.1 alone, where another program could have the port that is free on 127.0.0.2.
		strings.Replace(f.Upstream(func(*proxytest.Peer) {}).URL, "http://127.0.0.1", "127.0.0.2", 1): "",
	} {
		_, port, err := net.SplitHostPort(f.launchService(f.sidecar, addr))
		f.do(err)
		dial := proxytest.Must(proxy.SOCKS5("tcp", attacker.SOCKSAddr(), nil, proxy.Direct))(t)
		conn, err := dial.Dial("tcp", net.JoinHostPort(target, port))
		if err == nil {
			fmt.Fprintf(conn, "PROXY TCP4 %s %s 41000 %s\r\nPOST /v1/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n"+
				"Content-Length: %d\r\n\r\n%s", f.self(victim).IP, target, port, len(proxytest.Message), proxytest.Message)
			if answer, _ := io.ReadAll(conn); len(answer) > 0 {
				t.Errorf("%s: a forged identity is answered with %s", addr, answer)
			}
			conn.Close()
		}
		if refusal != "" {
			_, err := f.Proxy.WaitLine(refusal, proxytest.Timeout, func(l proxytest.Line) bool { return strings.Contains(l.Message(), refusal) })
			f.do(err)
		}
	}
	f.upstreamGot(0)
}

// TestCapability: only callers to whom the tailnet's policy grants it, which is asked again for connections that live on.
func TestCapability(t *testing.T) {
	t.Parallel()
	const capability = "example.com/cap/claude"
	f := setUp(t, tailnet.Options{})
	f.connected(fmt.Sprintf("[tailscale]\ncapability = %q", capability))
	_, c := f.client("laptop")
	base := f.url()
	if a := f.post(c, base); a.StatusCode != http.StatusForbidden || !strings.Contains(a.Text, capability) || !strings.Contains(a.Text, "laptop."+tailnet.Domain) {
		t.Errorf("without the grant: %d %s", a.StatusCode, a.Text)
	}
	if a := f.Post(); a.StatusCode != http.StatusForbidden || strings.Contains(a.Text, capability) {
		t.Errorf("from outside the tailnet: %d %s", a.StatusCode, a.Text)
	}
	f.tailnet.Control.Grant("example.com/cap/other", capability)
	proxytest.Eventually(t, "new connections are served", func() bool {
		c.CloseIdleConnections()
		return f.post(c, base).StatusCode == http.StatusOK
	})
	f.tailnet.Control.Grant("example.com/cap/other")
	proxytest.Within(t, 70*time.Second, "the connection that lives on is refused", func() bool { return f.post(c, base).StatusCode == http.StatusForbidden })
}
