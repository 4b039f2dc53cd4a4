package tailnet_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/proxy"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
	"anthropic-oauth-proxy/e2e/traffic"
)

// host is a pod of k8s/overlays/one-name: a tagged node that hosts the service, and the proxy behind it.
type host struct {
	*tailnet.Node
	version int // of the PROXY header
	proxy   *proxytest.Proxy
}

// serve starts the proxy of a host and then offers it to clients.
func (f *fixture) serve(h *host, s *tailnet.Service) {
	f.Helper()
	addr := f.launchService(h.Node, "127.0.0.2:0")
	h.proxy = f.Proxy
	f.do(h.Tailscale(f.Context(), "serve", "--service="+string(s.Name), "--tcp=8080",
		fmt.Sprint("--proxy-protocol=", h.version), "tcp://"+addr))
}

// drain ends that for new clients, and waits until another host has the route.
func (f *fixture) drain(h *host, s *tailnet.Service) {
	f.Helper()
	f.do(h.Tailscale(f.Context(), "serve", "drain", string(s.Name)))
	f.awaitOther(s, h)
}

func (f *fixture) awaitOther(s *tailnet.Service, h *host) {
	f.Helper()
	took := proxytest.Eventually(f.T, "another host than "+h.Name, func() bool {
		_, routed := s.Hosts()
		return routed != "" && routed != h.Name
	})
	f.Logf("another host than %s after %v", h.Name, took)
}

// launchService runs the proxy beside a node, for callers from the tailnet only, and returns where it expects PROXY headers.
func (f *fixture) launchService(n *tailnet.Node, listen string) (addr string) {
	f.Helper()
	p := f.running(n, fmt.Sprintf("[proxy]\nrequire_tailnet = true\nproxy_protocol_addr = %q", listen))
	return proxytest.WaitLog(f.T, p, proxytest.MsgRunning).Text("proxy_protocol_addr")
}

// serviceURL is what clients are given, and serviceAddr6 the address of IPv6 among those that it stands for.
const (
	serviceURL   = "http://claude." + tailnet.Domain + ":8080"
	serviceAddr6 = "fd7a:115c:a1e0::99"
)

// service makes a service with two hosts, the first of which has the route, and a client of it on another node, laptop.
func (f *fixture) service() (s *tailnet.Service, hosts []*host, laptop *tailnet.Node, c *http.Client) {
	f.Helper()
	s = f.tailnet.Control.Offer(f.Context(), "claude", netip.MustParseAddr("100.99.0.1"), netip.MustParseAddr(serviceAddr6))
	for i := range 2 {
		hosts = append(hosts, &host{Node: f.newNode(fmt.Sprint("claude-", i), "tag:claude"), version: i + 1})
		f.connect(hosts[i].Node)
	}
	for _, h := range hosts {
		f.serve(h, s)
	}
	laptop, c = f.client("laptop")
	proxytest.Eventually(f.T, "the service has both hosts", func() bool {
		all, routed := s.Hosts()
		if routed == hosts[1].Name { // the first was asked when it had no time to answer
			slices.Reverse(hosts)
		}
		return len(all) == len(hosts) && routed != ""
	})
	return s, hosts, laptop, c
}

// TestService: one name, of which each host answers while it is its turn, and knows who calls.
func TestService(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	s, hosts, laptop, c := f.service()
	user := proxytest.Must(laptop.User(t.Context()))(t)
	for i, h := range hosts {
		f.served(c, serviceURL)
		f.served(c, "http://["+serviceAddr6+"]:8080")
		proxytest.Eventually(t, "both requests are logged", func() bool { return len(completed(h.proxy)) == 2 })
		for _, line := range completed(h.proxy) {
			if line.Text("tailnet_node") != "laptop."+tailnet.Domain || line.Text("tailnet_user") != user {
				t.Errorf("%s: a request of laptop's is logged as %s", h.Name, line.Raw)
			}
		}
		if i == 0 {
			c.CloseIdleConnections()
			f.drain(h, s)
		}
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
	target := f.ip(f.sidecar)
	for addr, refusal := range map[string]string{
		"127.0.0.1:0": "forgery by attacker." + tailnet.Domain,
		"127.0.0.2:0": "", // where tailscaled does not hand anything on to
	} {
		_, port, err := net.SplitHostPort(f.launchService(f.sidecar, addr))
		f.do(err)
		dial := proxytest.Must(proxy.SOCKS5("tcp", attacker.SOCKSAddr(), nil, proxy.Direct))(t)
		conn, err := dial.Dial("tcp", net.JoinHostPort(target, port))
		if err == nil {
			fmt.Fprintf(conn, "PROXY TCP4 %s %s 41000 %s\r\nPOST /v1/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\n"+
				"Content-Length: %d\r\n\r\n%s", f.ip(victim), target, port, len(proxytest.Message), proxytest.Message)
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

// TestServiceChanges has ten users send messages to the service while something happens to it, and 500 in all. None may fail.
func TestServiceChanges(t *testing.T) { // not beside the other tests, whom its load would slow down
	for _, tt := range []struct {
		name       string
		routeDelay time.Duration
		happens    func(*fixture, *tailnet.Service, []*host, *traffic.Traffic)
	}{
		{"rollout", 3 * time.Second, (*fixture).rollOut},
		// It is gone without a word. Clients hang until the control server has noticed; here that takes 2 s.
		{"host dies", 0, func(f *fixture, s *tailnet.Service, hosts []*host, _ *traffic.Traffic) {
			f.do(errors.Join(hosts[0].Kill(), hosts[0].proxy.Signal(syscall.SIGKILL)))
			f.awaitOther(s, hosts[0])
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := setUp(t, tailnet.Options{RouteDelay: tt.routeDelay})
			f.upstream.Handle(fakeanthropic.API{Deltas: 10, Interval: 100 * time.Millisecond})
			s, hosts, _, c := f.service()
			l := traffic.New(c, serviceURL)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			l.Send(ctx)
			proxytest.Eventually(t, "50 messages", func() bool { return l.Messages() > 50 })
			tt.happens(f, s, hosts, l)
			proxytest.Within(t, time.Minute, "500 messages", func() bool { return l.Messages() > 500 })
			stop()
			f.check(l.End())
			t.Log(l)
		})
	}
}

// rollOut replaces both hosts, one after the other, as a StatefulSet of the manifests does: the service is drained first,
// and the proxy goes on until the control server has found another host.
func (f *fixture) rollOut(s *tailnet.Service, hosts []*host, l *traffic.Traffic) {
	for _, h := range hosts {
		f.Proxy = h.proxy
		l.Stream(20) // these end within a drain time
		proxytest.Eventually(f.T, "they are under way", func() bool {
			return proxytest.Scrape(f.T, f.Proxy).Value("proxy_requests_in_flight") >= 20
		})
		f.drain(h, s)
		time.Sleep(6 * time.Second) // the manifests wait for 20 s in all: the laptop has yet to hear of it
		f.Terminate()
		f.do(h.End(syscall.SIGTERM))
		f.do(h.Start(f.Context()))
		f.serve(h, s)
	}
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
