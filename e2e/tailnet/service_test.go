package tailnet_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

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
	f.t.Helper()
	var addr string
	h.proxy, addr = f.launchService(h.Node, "127.0.0.2:0")
	f.do(h.Serve(f.ctx, s, 8080, h.version, addr))
}

// launchService launches the proxy beside a connected node, for callers from the tailnet only, and returns where it expects PROXY headers.
func (f *fixture) launchService(n *tailnet.Node, listen string) (p *proxytest.Proxy, addr string) {
	f.t.Helper()
	p = f.launch(n, fmt.Sprintf("[proxy]\nrequire_tailnet = true\nproxy_protocol_addr = %q", listen))
	f.do(p.WaitRunning(proxytest.Timeout))
	return p, proxytest.WaitLog(f.t, p, proxytest.MsgRunning).Text("proxy_protocol_addr")
}

// serviceURL is what clients are given, and serviceAddr6 the address of IPv6 among those that it stands for.
const (
	serviceURL   = "http://claude." + tailnet.Domain + ":8080"
	serviceAddr6 = "fd7a:115c:a1e0::99"
)

// service makes a service with two hosts, the first of which has the route, and a client of it on another node, laptop.
func (f *fixture) service() (s *tailnet.Service, hosts []*host, laptop *tailnet.Node, c *http.Client) {
	f.t.Helper()
	s = f.tailnet.Control.Offer("claude", netip.MustParseAddr("100.99.0.1"), netip.MustParseAddr(serviceAddr6))
	f.t.Cleanup(s.Close)
	for i := range 2 {
		hosts = append(hosts, &host{Node: f.newNode(fmt.Sprint("claude-", i), "tag:claude"), version: i + 1})
		f.connect(hosts[i].Node)
	}
	for _, h := range hosts {
		f.serve(h, s)
	}
	laptop, c = f.client("laptop")
	proxytest.Eventually(f.t, "the service has both hosts", func() bool { return len(s.Hosts()) == len(hosts) && s.Host() != "" })
	if s.Host() == hosts[1].Name { // the first was asked when it had no time to answer
		slices.Reverse(hosts)
	}
	return s, hosts, laptop, c
}

// awaitOther waits until another host than h has the route.
func (f *fixture) awaitOther(s *tailnet.Service, h *host) {
	f.t.Helper()
	took := proxytest.Eventually(f.t, "another host than "+h.Name, func() bool { return s.Host() != "" && s.Host() != h.Name })
	f.t.Logf("another host than %s after %v", h.Name, took)
}

// TestService: one name, of which each host answers while it is its turn, and knows who calls.
func TestService(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	s, hosts, laptop, c := f.service()
	user, err := laptop.User(f.ctx)
	f.do(err)
	for i, h := range hosts {
		f.served(c, serviceURL)
		f.served(c, "http://["+serviceAddr6+"]:8080")
		proxytest.Eventually(f.t, "both requests are logged", func() bool { return len(completed(h.proxy)) == 2 })
		for _, line := range completed(h.proxy) {
			if line.Text("tailnet_node") != "laptop."+tailnet.Domain || line.Text("tailnet_user") != user {
				t.Errorf("%s: a request of laptop's is logged as %s", h.Name, line.Raw)
			}
		}
		if i == 0 {
			c.CloseIdleConnections()
			f.do(h.Drain(f.ctx, s))
			f.awaitOther(s, h)
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
	target, alias := f.ip(f.sidecar), f.ip(victim)
	for addr, refusal := range map[string]string{
		"127.0.0.1:0": "forgery by attacker." + tailnet.Domain,
		"127.0.0.2:0": "", // where tailscaled does not hand anything on to
	} {
		p, listens := f.launchService(f.sidecar, addr)
		_, port, err := net.SplitHostPort(listens)
		f.do(err)
		conn, err := net.Dial("tcp", attacker.HTTPProxyAddr())
		f.do(err)
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s:%s HTTP/1.1\r\nHost: x\r\n\r\n", target, port)
		from := bufio.NewReader(conn)
		resp, err := http.ReadResponse(from, &http.Request{Method: http.MethodConnect})
		if err == nil && resp.StatusCode == http.StatusOK {
			fmt.Fprintf(conn, "PROXY TCP4 %s %s 41000 %s\r\n", alias, target, port)
			fmt.Fprintf(conn, "POST /v1/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: %d\r\n\r\n%s", len(proxytest.Message), proxytest.Message)
			if answer, err := http.ReadResponse(from, nil); err == nil {
				t.Errorf("%s: a forged identity is answered with %s", addr, answer.Status)
			}
		} else if refusal != "" {
			t.Errorf("%s: the attacker does not reach the port: %v, %v", addr, resp, err)
		}
		if refusal != "" {
			_, err := p.WaitLine(refusal, proxytest.Timeout, func(l proxytest.Line) bool { return strings.Contains(l.Message(), refusal) })
			f.do(err)
		}
	}
	f.upstreamGot(0)
}

// under has ten users send messages to the service while something happens to it, and 500 in all. None may fail.
func (f *fixture) under(c *http.Client, happens func(*traffic.Traffic)) {
	f.t.Helper()
	l := traffic.New(c, serviceURL)
	ctx, stop := context.WithCancel(f.ctx)
	defer stop()
	l.Send(ctx)
	proxytest.Eventually(f.t, "50 messages", func() bool { return l.Messages() > 50 })
	happens(l)
	proxytest.Within(f.t, time.Minute, "500 messages", func() bool { return l.Messages() > 500 })
	stop()
	f.check(l.End())
	f.t.Log(l)
}

// TestServiceRollout replaces both hosts, one after the other, as a StatefulSet of the manifests does: the service is
// drained first, and the proxy goes on until the control server has found another host. Here that takes 3 s.
func TestServiceRollout(t *testing.T) { // not beside the others, whom its load would slow down
	f := setUp(t, tailnet.Options{RouteDelay: 3 * time.Second})
	f.upstream.Handle(fakeanthropic.API{Deltas: 10, Interval: 100 * time.Millisecond})
	s, hosts, _, c := f.service()
	f.under(c, func(l *traffic.Traffic) {
		for _, h := range hosts {
			l.Stream(20) // these end within a drain time
			proxytest.Eventually(f.t, "they are under way", func() bool { return proxytest.Scrape(t, h.proxy).Value("proxy_requests_in_flight") >= 20 })
			f.do(h.Drain(f.ctx, s))
			f.awaitOther(s, h)
			time.Sleep(6 * time.Second) // the manifests wait for 20 s in all: the laptop has yet to hear of it
			f.do(h.proxy.Signal(syscall.SIGTERM))
			_, err := h.proxy.Wait(proxytest.Timeout)
			f.do(err)
			f.do(h.Terminate())
			f.do(h.Node.Start(f.ctx))
			f.serve(h, s)
		}
	})
}

// TestServiceHostDies: the host that serves is gone without a word. Clients hang until the control server has noticed;
// here that takes 2 s.
func TestServiceHostDies(t *testing.T) { // likewise
	f := setUp(t, tailnet.Options{})
	s, hosts, _, c := f.service()
	f.under(c, func(*traffic.Traffic) {
		f.do(errors.Join(hosts[0].Kill(), hosts[0].proxy.Signal(syscall.SIGKILL)))
		f.awaitOther(s, hosts[0])
	})
}

// TestCapability: only callers to whom the tailnet's policy grants it, which is asked again for connections that live on.
func TestCapability(t *testing.T) {
	t.Parallel()
	const capability = "example.com/cap/claude"
	f := setUp(t, tailnet.Options{})
	p := f.running(fmt.Sprintf("[tailscale]\ncapability = %q", capability))
	_, c := f.client("laptop")
	base := f.tailnetURL(p)
	if a := f.post(c, base); a.StatusCode != http.StatusForbidden || !strings.Contains(a.Text, capability) || !strings.Contains(a.Text, "laptop."+tailnet.Domain) {
		t.Errorf("without the grant: %d %s", a.StatusCode, a.Text)
	}
	if a := f.post(http.DefaultClient, p.URL()); a.StatusCode != http.StatusForbidden || strings.Contains(a.Text, capability) {
		t.Errorf("from outside the tailnet: %d %s", a.StatusCode, a.Text)
	}
	f.tailnet.Control.Grant("example.com/cap/other", capability)
	proxytest.Eventually(f.t, "new connections are served", func() bool {
		c.CloseIdleConnections()
		return f.post(c, base).StatusCode == http.StatusOK
	})
	f.tailnet.Control.Grant("example.com/cap/other")
	proxytest.Within(t, 70*time.Second, "the connection that lives on is refused", func() bool { return f.post(c, base).StatusCode == http.StatusForbidden })
}
