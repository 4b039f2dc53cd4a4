package tailnet_test

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"syscall"
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
	f.connect(f.sidecar)
	laptop, fromLaptop := f.client("laptop")
	_, fromRunner := f.client("runner", "tag:build", "tag:ci")
	user := f.self(laptop).User

	for config, outside := range map[string]int{"": 200, "[proxy]\nrequire_tailnet = true": 403} {
		f.running(f.sidecar, config)
		for i, tt := range []struct {
			client     *http.Client
			base       string
			status     int
			node, user string // in the log
		}{
			{fromLaptop, f.url(), 200, "laptop." + tailnet.Domain, user},
			{fromRunner, f.url(), 200, "runner." + tailnet.Domain, "tag:build,tag:ci"},
			{f.Client, f.Proxy.URL(), outside, "", ""}, // no node, on the proxy's own machine
		} {
			a := f.post(tt.client, tt.base, "Anthropic-Beta", "first-2025-01-01,second-2025-01-01", "Anthropic-Beta", "third-2025-01-01",
				"Tailscale-User-Login", "admin@example.com", "X-Forwarded-For", f.self(laptop).IP, "Forwarded", "for="+f.self(laptop).IP)
			if tt.status == 403 {
				f.Refused(a, 403, "forbidden", 0, "")
			} else if a.StatusCode != 200 || !strings.Contains(a.Text, `"stop_reason":"end_turn"`) {
				t.Errorf("with %q, %s: status %d, want 200: %s", config, tt.base, a.StatusCode, a.Text)
			}
			proxytest.Eventually(t, "its line in the log", func() bool { return len(completed(f.Proxy)) > i })
			if line := completed(f.Proxy)[i]; line.Text("tailnet_node") != tt.node || line.Text("tailnet_user") != tt.user {
				t.Errorf("logged as %s, want node %q and user %q", line.Raw, tt.node, tt.user)
			}
		}
		for _, path := range []string{"/health", "/livez", "/metrics"} { // probes and scrapes come from outside
			if a := f.Get(path); a.StatusCode != http.StatusOK {
				t.Errorf("GET %s from outside: %d, want 200", path, a.StatusCode)
			}
		}
	}
	f.upstreamGot(5)
	for _, got := range f.upstream.Requests() {
		betas := strings.ReplaceAll(strings.Join(got.Header.Values("Anthropic-Beta"), ","), " ", "")
		if want := "first-2025-01-01,second-2025-01-01,third-2025-01-01,oauth-2025-04-20"; betas != want {
			t.Errorf("anthropic-beta %q, want %q", betas, want)
		}
		if got.Header.Get("Authorization") != "Bearer test-token" || string(got.Body) != proxytest.Message ||
			got.Header.Get("Tailscale-User-Login") != "" {
			t.Errorf("changed, or with a forged identity: %v %q", got.Header, got.Body)
		}
	}
}

// stream begins an answer whose events come one at a time, and reads the first one. next asks for another and reads it: if
// anything on the way waited for more, it would never arrive. finish lets the stream end. Later requests are answered as usual.
func (f *fixture) stream(c *http.Client, base string) (next, finish func()) {
	f.Helper()
	more := make(chan bool)
	end := sync.OnceFunc(func() { close(more) })
	f.Cleanup(end)
	f.upstream.Handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for open := true; open; open = <-more {
			io.WriteString(w, proxytest.Event)
			http.NewResponseController(w).Flush()
		}
	}))
	resp := proxytest.Must(c.Do(f.request(base)))(f.T)
	f.Cleanup(func() { resp.Body.Close() })
	f.upstream.Handle(nil)
	read := func() {
		f.Helper()
		got := make([]byte, len(proxytest.Event))
		if n, err := io.ReadFull(resp.Body, got); string(got) != proxytest.Event {
			f.Fatalf("the next event is %q, %v", got[:n], err)
		}
	}
	read()
	next = func() {
		f.Helper()
		more <- true
		read()
	}
	finish = func() {
		f.Helper()
		end()
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			f.Errorf("the stream ended with %q, %v; want its clean end", rest, err)
		}
	}
	return next, finish
}

// TestVanishedClient: a laptop's lid is closed. The sidecar acknowledges for it what the proxy sends, and has to notice.
func TestVanishedClient(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.upstream.Handle(fakeanthropic.Silent())
	f.connected("[proxy]\ntimeout_secs = 600")
	node, c := f.client("laptop")
	go c.Do(f.request(f.url())) // until the node is killed
	proxytest.Eventually(t, "the request is at the upstream", func() bool { return len(f.upstream.Requests()) == 1 })
	f.do(node.Signal(syscall.SIGSTOP))
	start := time.Now()
	line := proxytest.Must(f.Proxy.WaitLog(proxytest.MsgRequestCompleted, 2*time.Minute))(t)
	if took := time.Since(start); line.Number("status") != 499 || took > 75*time.Second {
		t.Errorf("%s after %v, want status 499 after a minute", line.Raw, took)
	}
}
