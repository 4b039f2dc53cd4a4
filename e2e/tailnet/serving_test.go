package tailnet_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestCallers: who is let in, by which name, and how their requests arrive. What serve and other proxies tell about
// callers is easily forged.
func TestCallers(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	open, required := f.running(""), f.launch(f.sidecar, "[proxy]\nrequire_tailnet = true")
	f.do(required.WaitRunning(proxytest.Timeout))
	laptop, fromLaptop := f.client("laptop")
	_, fromRunner := f.client("runner", "tag:build", "tag:ci")
	user, err := laptop.User(f.ctx)
	f.do(err)
	const laptopName, runnerName = "laptop." + tailnet.Domain, "runner." + tailnet.Domain

	for _, tt := range []struct {
		name       string
		proxy      *proxytest.Proxy
		client     *http.Client // nil: who is no node, on the proxy's own machine
		status     int
		node, user string // in the log
	}{
		{name: "person", proxy: open, client: fromLaptop, status: 200, node: laptopName, user: user},
		{name: "person, required", proxy: required, client: fromLaptop, status: 200, node: laptopName, user: user},
		{name: "tagged", proxy: open, client: fromRunner, status: 200, node: runnerName, user: "tag:build,tag:ci"},
		{name: "tagged, required", proxy: required, client: fromRunner, status: 200, node: runnerName, user: "tag:build,tag:ci"},
		{name: "outside", proxy: open, status: 200},
		{name: "outside, required", proxy: required, status: 403},
	} {
		c, url, before := tt.client, f.tailnetURL(tt.proxy), len(completed(tt.proxy))
		if c == nil {
			c, url = http.DefaultClient, tt.proxy.URL()
		}
		a := f.post(c, url, "Anthropic-Beta", "first-2025-01-01,second-2025-01-01", "Anthropic-Beta", "third-2025-01-01",
			"Tailscale-User-Login", "admin@example.com", "X-Forwarded-For", f.ip(laptop), "Forwarded", "for="+f.ip(laptop))
		if a.StatusCode != tt.status || strings.Contains(a.Text, `"stop_reason":"end_turn"`) != (tt.status == 200) {
			t.Errorf("%s: status %d, want %d: %s", tt.name, a.StatusCode, tt.status, a.Text)
		}
		proxytest.Eventually(f.t, "its line in the log", func() bool { return len(completed(tt.proxy)) > before })
		if line := completed(tt.proxy)[before]; line.Text("tailnet_node") != tt.node || line.Text("tailnet_user") != tt.user {
			t.Errorf("%s: logged as %s, want node %q and user %q", tt.name, line.Raw, tt.node, tt.user)
		}
		var refusal struct {
			Type  string
			Error struct{ Type, Message string }
		}
		if err := json.Unmarshal([]byte(a.Text), &refusal); tt.status == 403 && (err != nil || refusal.Type != "error" || refusal.Error.Message == "") {
			t.Errorf("%s: the refusal is %s", tt.name, a.Text)
		}
	}
	f.upstreamGot(5)
	for _, got := range f.upstream.Requests() {
		betas := strings.ReplaceAll(strings.Join(got.Header.Values("Anthropic-Beta"), ","), " ", "")
		if want := "first-2025-01-01,second-2025-01-01,third-2025-01-01,oauth-2025-04-20"; betas != want {
			t.Errorf("anthropic-beta %q, want %q", betas, want)
		}
		if got.Header.Get("Authorization") != "Bearer test-token" || string(got.Body) != proxytest.Message || got.Header.Get("Tailscale-User-Login") != "" {
			t.Errorf("changed, or with a forged identity: %v %q", got.Header, got.Body)
		}
	}
	for _, path := range []string{"/health", "/livez", "/metrics"} { // probes and scrapes come from outside
		if resp, err := http.Get(required.URL() + path); err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("GET %s from outside: %v, %v; want 200", path, resp, err)
		}
	}
}

// stream begins an answer whose events come one at a time, and reads the first one. next asks for another and reads it: if
// anything on the way waited for more, it would never arrive. finish lets the stream end. Later requests are answered as usual.
func (f *fixture) stream(c *http.Client, base string) (next, finish func()) {
	f.t.Helper()
	more := make(chan struct{})
	f.upstream.Handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for i, open := 0, true; open; i++ {
			fakeanthropic.WriteEvent(w, map[string]any{"type": "ping", "index": i})
			select {
			case _, open = <-more:
			case <-r.Context().Done():
				return
			}
		}
	}))
	resp, err := c.Do(f.request(base))
	f.do(err)
	f.t.Cleanup(func() { resp.Body.Close() })
	f.upstream.Handle(nil)
	events := 0
	read := func() {
		f.t.Helper()
		want := fmt.Sprintf("event: ping\ndata: {\"index\":%d,\"type\":\"ping\"}\n\n", events)
		got := make([]byte, len(want))
		if n, err := io.ReadFull(resp.Body, got); string(got) != want {
			f.t.Fatalf("event %d is %q, %v; want %q", events, got[:n], err, want)
		}
		events++
	}
	read()
	next = func() {
		f.t.Helper()
		more <- struct{}{}
		read()
	}
	finish = func() {
		f.t.Helper()
		close(more)
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			f.t.Errorf("the stream ended with %q, %v; want its clean end", rest, err)
		}
	}
	return next, finish
}

func TestStreamThroughWireGuard(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	_, c := f.client("laptop")
	next, finish := f.stream(c, f.tailnetURL(p))
	for range 59 {
		next()
	}
	finish()
	line := proxytest.WaitLog(t, p, proxytest.MsgRequestCompleted)
	if line.Number("status") != http.StatusOK || line.Text("error") != "" {
		t.Errorf("the stream was logged as %s", line.Raw)
	}
}

// TestVanishedClient: a laptop's lid is closed. The sidecar acknowledges for it what the proxy sends, and has to notice.
func TestVanishedClient(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.upstream.Handle(fakeanthropic.Silent())
	p := f.running("[proxy]\ntimeout_secs = 600")
	node, c := f.client("laptop")
	go c.Post(f.tailnetURL(p)+"/v1/messages", "application/json", strings.NewReader(proxytest.Message)) // until the node is killed
	proxytest.Eventually(f.t, "the request is at the upstream", func() bool { return len(f.upstream.Requests()) == 1 })
	f.do(node.Freeze())
	start := time.Now()
	line, err := p.WaitLog(proxytest.MsgRequestCompleted, 2*time.Minute)
	f.do(err)
	if took := time.Since(start); line.Number("status") != 499 || took > 75*time.Second {
		t.Errorf("%s after %v, want status 499 after a minute", line.Raw, took)
	}
}
