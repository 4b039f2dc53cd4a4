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
	f       *fixture
	node    *tailnet.Node
	service *tailnet.Service
	proxy   *proxytest.Proxy
	version int // of the PROXY header
}

// newHost starts a host that does not serve yet.
func (f *fixture) newHost(s *tailnet.Service, name string, version int) *host {
	h := &host{f: f, node: f.newNode(name), service: s, version: version}
	h.node.Tags = []string{"tag:claude"}
	f.connect(h.node)
	return h
}

// serve starts the proxy and then offers it to clients.
func (h *host) serve() {
	h.f.t.Helper()
	config := strings.Replace(h.f.config("proxy_protocol_addr = \"127.0.0.2:0\"\nrequire_tailnet = true"), h.f.sidecar.Socket, h.node.Socket, 1)
	h.proxy = proxytest.Launch(h.f.t, proxytest.Options{Config: config, Env: h.f.upstream.Env()})
	h.f.do(h.proxy.WaitRunning(proxytest.Timeout))
	line := proxytest.WaitLog(h.f.t, h.proxy, proxytest.MsgRunning)
	h.f.do(h.node.Serve(h.f.ctx, h.service, 8080, h.version, line.Text("proxy_protocol_addr")))
}

// serviceURL is what clients are given, and serviceAddr6 the address of IPv6 among those that it stands for.
const (
	serviceURL   = "http://claude." + tailnet.Domain + ":8080"
	serviceAddr6 = "fd7a:115c:a1e0::99"
)

// service makes a service with two hosts, and a client of it on another node, laptop.
func (f *fixture) service() (s *tailnet.Service, hosts []*host, laptop *tailnet.Node, c *http.Client) {
	f.t.Helper()
	s = f.tailnet.Control.Offer("claude", netip.MustParseAddr("100.99.0.1"), netip.MustParseAddr(serviceAddr6))
	f.t.Cleanup(s.Close)
	hosts = []*host{f.newHost(s, "claude-0", 1), f.newHost(s, "claude-1", 2)}
	for _, h := range hosts {
		h.serve()
	}
	laptop, c = f.client("laptop")
	within(f.t, soon, "the service has both hosts", func() bool { return len(s.Hosts()) == len(hosts) && s.Host() != "" })
	if s.Host() == hosts[1].node.Name { // the first was asked when it had no time to answer
		slices.Reverse(hosts)
	}
	return s, hosts, laptop, c
}

// TestService: one name, of which each host answers while it is its turn, and knows who calls.
func TestService(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	s, hosts, laptop, c := f.service()
	user, err := laptop.User(f.ctx)
	f.do(err)
	for i, h := range hosts {
		if status, body := post(t, c, serviceURL); status != http.StatusOK {
			t.Fatalf("%s: status %d: %s", h.node.Name, status, body)
		}
		if status, body := post(t, c, "http://["+serviceAddr6+"]:8080"); status != http.StatusOK {
			t.Fatalf("%s, by IPv6: status %d: %s", h.node.Name, status, body)
		}
		within(t, soon, "both requests are logged", func() bool { return len(completed(h.proxy)) == 2 })
		for _, line := range completed(h.proxy) {
			checkCaller(t, line, "laptop", user)
		}
		if i == 0 {
			c.CloseIdleConnections()
			f.do(h.node.Drain(f.ctx, s))
			within(t, soon, "the other host has the route", func() bool { return s.Host() == hosts[1].node.Name })
		}
	}
}

// completed returns the lines of a proxy's requests.
func completed(p *proxytest.Proxy) []proxytest.Line {
	return linesWith(p, func(l proxytest.Line) bool { return l.Message() == proxytest.MsgRequestCompleted })
}

// TestForgedIdentity: a peer that reaches the port of the PROXY listener directly, through a userspace tailscaled, which hands
// it on to loopback.
func TestForgedIdentity(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.connect(f.sidecar)
	victim, _ := f.client("victim")
	attacker, _ := f.client("attacker")
	target, err := f.sidecar.IP(f.ctx)
	f.do(err)
	alias, err := victim.IP(f.ctx)
	f.do(err)
	for _, row := range []struct{ addr, refusal string }{
		{addr: "127.0.0.1:0", refusal: "forgery by attacker." + tailnet.Domain},
		{addr: "127.0.0.2:0"}, // where tailscaled does not hand anything on to
	} {
		p := proxytest.Launch(t, proxytest.Options{Config: f.config(fmt.Sprintf("require_tailnet = true\nproxy_protocol_addr = %q", row.addr)), Env: f.upstream.Env()})
		running, err := p.WaitLog(proxytest.MsgRunning, proxytest.Timeout)
		f.do(err)
		_, port, err := net.SplitHostPort(running.Text("proxy_protocol_addr"))
		f.do(err)
		conn, err := net.Dial("tcp", attacker.HTTPProxyAddr())
		f.do(err)
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT %s:%s HTTP/1.1\r\nHost: x\r\n\r\n", target, port)
		from := bufio.NewReader(conn)
		resp, err := http.ReadResponse(from, &http.Request{Method: http.MethodConnect})
		if err == nil && resp.StatusCode == http.StatusOK {
			fmt.Fprintf(conn, "PROXY TCP4 %s %s 41000 %s\r\nPOST /v1/messages HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer t\r\nContent-Length: %d\r\n\r\n%s", alias, target, port, len(message), message)
			if answer, err := http.ReadResponse(from, nil); err == nil {
				t.Errorf("%s: a forged identity is answered with %s", row.addr, answer.Status)
			}
		} else if row.refusal != "" {
			t.Errorf("%s: the attacker does not reach the port: %v, %v", row.addr, resp, err)
		}
		if row.refusal != "" {
			_, err := p.WaitLine("the refusal", proxytest.Timeout, func(l proxytest.Line) bool { return strings.Contains(l.Message(), row.refusal) })
			f.do(err)
		}
	}
	if n := len(f.upstream.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests", n)
	}
}

// TestServiceRollout replaces both hosts, one after the other, as a StatefulSet of the manifests does: the service is drained
// first, and the proxy goes on until the control server has found another host. Here that takes 3 s.
func TestServiceRollout(t *testing.T) { // not beside the others, whom its load would slow down
	f := setUp(t, tailnet.Options{})
	f.upstream.Handle(fakeanthropic.API{Deltas: 10, Interval: 100 * time.Millisecond})
	s, hosts, _, c := f.service()
	s.SetDelay(3 * time.Second)
	l := traffic.New(c, serviceURL)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	l.Send(ctx)
	for _, h := range hosts {
		l.Stream(20) // these end within a drain time
		within(t, soon, "they are under way", func() bool { return proxytest.Scrape(t, h.proxy).Value("proxy_requests_in_flight") >= 20 })
		f.do(h.node.Drain(f.ctx, s))
		within(t, time.Minute, "another host has the route", func() bool { return s.Host() != h.node.Name })
		time.Sleep(6 * time.Second) // the manifests wait for 20 s in all: the laptop has yet to hear of it
		f.do(h.proxy.Signal(syscall.SIGTERM))
		_, err := h.proxy.Wait(proxytest.Timeout)
		f.do(err)
		f.do(h.node.Terminate())
		f.start(h.node)
		h.serve()
	}
	within(t, time.Minute, "500 messages", func() bool { return l.Messages() > 500 })
	stop()
	if err := l.End(); err != nil {
		t.Error(err)
	}
	t.Log(l)
}

// TestServiceHostDies: the host that serves is gone without a word. Clients hang until the control server has noticed; here that
// takes 2 s.
func TestServiceHostDies(t *testing.T) { // likewise
	f := setUp(t, tailnet.Options{})
	s, hosts, _, c := f.service()
	l := traffic.New(c, serviceURL)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	l.Send(ctx)
	time.Sleep(time.Second)
	f.do(errors.Join(hosts[0].node.Kill(), hosts[0].proxy.Signal(syscall.SIGKILL)))
	t.Logf("another host after %v", within(t, time.Minute, "another host", func() bool { return s.Host() == hosts[1].node.Name }))
	within(t, time.Minute, "500 messages", func() bool { return l.Messages() > 500 })
	stop()
	if err := l.End(); err != nil {
		t.Error(err)
	}
	t.Log(l)
}

// TestCapability: only callers to whom the tailnet's policy grants it, which is asked again for connections that live on.
func TestCapability(t *testing.T) {
	t.Parallel()
	const capability = "example.com/cap/claude"
	f := setUp(t, tailnet.Options{})
	f.connect(f.sidecar)
	p := proxytest.Launch(t, proxytest.Options{Config: strings.Replace(f.config(""), "[proxy]", fmt.Sprintf("capability = %q\n[proxy]", capability), 1), Env: f.upstream.Env()})
	f.do(p.WaitRunning(proxytest.Timeout))
	_, c := f.client("laptop")
	base := f.tailnetURL(p)
	if status, body := post(t, c, base); status != http.StatusForbidden || !strings.Contains(body, capability) || !strings.Contains(body, "laptop."+tailnet.Domain) {
		t.Errorf("without the grant: %d %s", status, body)
	}
	if status, body := post(t, http.DefaultClient, p.URL()); status != http.StatusForbidden || strings.Contains(body, capability) {
		t.Errorf("from outside the tailnet: %d %s", status, body)
	}
	f.tailnet.Control.Grant("example.com/cap/other", capability)
	within(t, soon, "new connections are served", func() bool {
		c.CloseIdleConnections()
		status, _ := post(t, c, base)
		return status == http.StatusOK
	})
	f.tailnet.Control.Grant("example.com/cap/other")
	took := within(t, 2*time.Minute, "the connection that lives on is refused", func() bool {
		time.Sleep(time.Second)
		status, _ := post(t, c, base)
		return status == http.StatusForbidden
	})
	t.Logf("refused after %v", took)
	if took > 70*time.Second {
		t.Errorf("refused after %v, want a minute", took)
	}
}
