package tailnet_test

import (
	"bufio"
	"context"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestTailnetLostAndRegained takes the tailnet away from a running proxy, which
// tells, goes on serving, and tells when it is back.
func TestTailnetLostAndRegained(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		lose   func(*fixture) // returns when the daemon knows
		cause  string         // the error that the log names
		limit  time.Duration  // for the proxy to follow the loss
		regain func(*fixture)
	}{
		{
			name:   "SIGKILL and restart",
			lose:   func(f *fixture) { f.do(f.sidecar.Kill()) },
			cause:  "TailnetNotRunning",
			limit:  soon,
			regain: func(f *fixture) { f.start(f.sidecar) },
		},
		{
			name:   "SIGTERM and restart",
			lose:   func(f *fixture) { f.do(f.sidecar.Terminate()) },
			cause:  "TailnetNotRunning",
			limit:  soon,
			regain: func(f *fixture) { f.start(f.sidecar) },
		},
		{
			name: "key expiry and extension",
			lose: func(f *fixture) {
				f.do(f.tailnet.Control.SetKeyExpiry(f.ctx, f.sidecar, time.Now().Add(-time.Minute)))
				f.await(ipn.NeedsLogin)
			},
			cause:  "TailnetAuth",
			limit:  soon,
			regain: func(f *fixture) { f.do(f.tailnet.Control.SetKeyExpiry(f.ctx, f.sidecar, time.Now().Add(time.Hour))) },
		},
		{
			name: "logout and login",
			lose: func(f *fixture) {
				f.do(f.sidecar.Logout(f.ctx))
				f.await(ipn.NeedsLogin)
			},
			cause:  "TailnetAuth",
			limit:  soon,
			regain: func(f *fixture) { f.do(f.sidecar.Up(f.ctx, "")) },
		},
		{
			name: "down and up",
			lose: func(f *fixture) {
				f.do(f.sidecar.Down(f.ctx))
				f.await(ipn.Stopped)
			},
			cause:  "TailnetNotRunning",
			limit:  soon,
			regain: func(f *fixture) { f.do(f.sidecar.Up(f.ctx, "")) },
		},
		{
			name:   "SIGSTOP and SIGCONT",
			lose:   func(f *fixture) { f.do(f.sidecar.Stop()) },
			cause:  "TailnetNotRunning",
			limit:  20*time.Second + soon, // 20 s is the promise; the rest is for a busy machine
			regain: func(f *fixture) { f.do(f.sidecar.Cont()) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tailnet.Options{})
			p := f.running("")
			stream := f.openStream(p)

			tt.lose(f)
			t.Logf("the loss showed after %v", follows(t, p, tt.limit, false))
			checkSaidOnce(t, p, tt.cause)
			checkStillServes(t, p)
			stream.finish(t)

			tt.regain(f)
			f.await(ipn.Running)
			t.Logf("the recovery showed after %v", follows(t, p, soon, true))
			checkStillServes(t, p)
			checkSaidOnce(t, p, tt.cause)
		})
	}
}

// liveStream is an event stream that does not come through the daemon.
type liveStream struct {
	resp *http.Response
	body *bufio.Reader
	more steps
}

// openStream starts a stream that lasts until finish.
func (f *fixture) openStream(p *proxytest.Proxy) *liveStream {
	f.t.Helper()
	more := make(steps)
	f.upstream.Handle(more)
	resp := send(f.t, &http.Client{Transport: &http.Transport{}}, p.URL(), message)
	f.t.Cleanup(func() { resp.Body.Close() })
	s := &liveStream{resp, bufio.NewReader(resp.Body), more}
	if got := readEvent(f.t, s.body); got != event(0) {
		f.t.Fatalf("the stream began with %q", got)
	}
	f.upstream.Handle(nil) // for the requests that follow
	return s
}

// finish checks that the stream is alive and lets it end.
func (s *liveStream) finish(t *testing.T) {
	t.Helper()
	s.more <- struct{}{}
	if got := readEvent(t, s.body); got != event(1) {
		t.Errorf("the stream went on with %q", got)
	}
	close(s.more)
	if rest, err := io.ReadAll(s.body); err != nil || len(rest) > 0 {
		t.Errorf("the stream ended with %q, %v; want its clean end", rest, err)
	}
}

// watchFor is how long checkSaidOnce waits for a line too many: longer than the
// longest pause between two attempts to reach the daemon, which is 2 s.
const watchFor = 5 * time.Second

// checkSaidOnce watches that the loss is logged by one line that names its cause,
// and not by one for every attempt to reach the daemon or every state on its way.
func checkSaidOnce(t *testing.T, p *proxytest.Proxy, cause string) {
	t.Helper()
	within(t, soon, "the loss in the log", func() bool { return len(troubles(p)) > 0 })
	for end := time.Now().Add(watchFor); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		lines := troubles(p)
		if len(lines) > 1 {
			t.Fatalf("the loss was logged %d times:\n%s\n%s", len(lines), lines[0].Raw, lines[1].Raw)
		}
		if !namesError(lines[0], cause) {
			t.Fatalf("the loss was logged as %s\nwant %s", lines[0].Raw, cause)
		}
	}
}

// checkStillServes checks that the process lives and relays requests.
func checkStillServes(t *testing.T, p *proxytest.Proxy) {
	t.Helper()
	start := time.Now()
	if status, body := post(t, http.DefaultClient, p.URL()); status != http.StatusOK {
		t.Errorf("status %d: %s", status, body)
	}
	if took := time.Since(start); took > soon {
		t.Errorf("a request took %v: the tailnet must not be in its way", took)
	}
}

// TestSidecarStartsOver: containerboot exits when its node leaves the tailnet,
// the kubelet starts it again, and it logs in. The proxy sees its daemon end and
// another one come.
func TestSidecarStartsOver(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.inBackground(func(ctx context.Context) {
		if err := f.sidecar.KeepBooting(ctx, rightKey); err != nil {
			t.Error(err)
		}
	})
	p := f.launch("")
	f.do(p.WaitRunning(proxytest.Timeout))
	starts := func() int { return strings.Count(f.sidecar.Log(), "Starting tailscaled") }
	before := starts()

	_ = f.sidecar.Logout(f.ctx) // it fails if the daemon ends before it has answered
	// The loss may be over before it can be seen here: the first restart is quick.
	within(t, time.Minute, "a restart of the sidecar", func() bool { return starts() > before })
	f.await(ipn.Running)
	t.Logf("the recovery showed after %v", follows(t, p, soon, true))
	ip, err := f.sidecar.IP(f.ctx)
	f.do(err)
	awaitIP(t, p, ip) // another one, unless the daemon died before it had thrown its key away
	checkStillServes(t, p)
	losses := slices.DeleteFunc(troubles(p), func(l proxytest.Line) bool {
		return !strings.HasPrefix(l.Text("message"), "tailnet connection lost") // the start has lines of its own
	})
	if len(losses) > 2 { // it may see the logout before the end
		t.Errorf("one loss was logged %d times: %v", len(losses), losses)
	}
}

// TestRequireTailnetFailsClosed: callers whom tailscaled does not name within 10 s are
// refused, to come again, while the endpoints for probes still answer.
func TestRequireTailnetFailsClosed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		lose func(*tailnet.Node) error
	}{
		{"dead daemon", (*tailnet.Node).Kill},
		{"hung daemon", (*tailnet.Node).Stop},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tailnet.Options{})
			p := f.running("require_tailnet = true")
			f.do(tt.lose(f.sidecar))
			start := time.Now()
			if status, body := post(t, http.DefaultClient, p.URL()); status != http.StatusServiceUnavailable || !strings.Contains(body, "caller_unknown") {
				t.Errorf("status %d, want 503: %s", status, body)
			}
			if took := time.Since(start); took > 10*time.Second+soon {
				t.Errorf("the refusal took %v", took)
			} else {
				t.Logf("refused after %v", took)
			}
			if n := len(f.upstream.Requests()); n != 0 {
				t.Errorf("the upstream got %d requests, want none", n)
			}
		})
	}
}

func TestControlLostWhileRunning(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	_, c := f.client("laptop")
	within(t, soon, "tailnet_control_online 1", func() bool {
		return proxytest.Scrape(t, p).Value("tailnet_control_online") == 1
	})
	if status, body := post(t, c, f.tailnetURL(p)); status != http.StatusOK {
		t.Fatalf("status %d: %s", status, body)
	}

	f.do(f.tailnet.Control.Stop())
	took := within(t, 2*time.Minute, "tailnet_control_online 0", func() bool {
		if status, _, err := p.Health(); err != nil || status != http.StatusOK {
			t.Fatalf("/health: %d, %v; want 200, as the tailnet still works", status, err)
		}
		m := proxytest.Scrape(t, p)
		if m.Value("tailnet_connected") != 1 {
			t.Fatal("tailnet_connected is not 1, but the tailnet still works")
		}
		return m.Value("tailnet_control_online") == 0
	})
	t.Logf("tailnet_control_online was 0 after %v", took)
	if status, body := post(t, c, f.tailnetURL(p)); status != http.StatusOK {
		t.Errorf("status %d through the tailnet without a control server: %s", status, body)
	}

	f.do(f.tailnet.Control.Start())
	took = within(t, 2*time.Minute, "tailnet_control_online 1", func() bool {
		return proxytest.Scrape(t, p).Value("tailnet_control_online") == 1
	})
	t.Logf("tailnet_control_online was 1 again after %v", took)
}

func TestKeyExpiryIsExported(t *testing.T) {
	t.Parallel()
	const name = "tailnet_key_expiry_timestamp_seconds"
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	if proxytest.Scrape(t, p).Has(name) {
		t.Errorf("%s is there, but the key never expires", name)
	}
	expiry := time.Now().Add(24 * time.Hour).Truncate(time.Second)
	f.do(f.tailnet.Control.SetKeyExpiry(f.ctx, f.sidecar, expiry))
	took := within(t, time.Minute, name, func() bool {
		return proxytest.Scrape(t, p).Value(name) == float64(expiry.Unix())
	})
	t.Logf("exported after %v", took)
}

// TestAnotherIdentityAfterLogin: who logs in anew is another node.
func TestAnotherIdentityAfterLogin(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	before, err := f.sidecar.IP(f.ctx)
	f.do(err)
	f.do(f.sidecar.Logout(f.ctx))
	follows(t, p, soon, false)
	f.do(f.sidecar.Up(f.ctx, ""))
	f.await(ipn.Running)
	after, err := f.sidecar.IP(f.ctx)
	f.do(err)
	if before == after {
		t.Fatalf("the node kept its address %v: the test proves nothing", after)
	}
	follows(t, p, soon, true)
	awaitIP(t, p, after)
}

// awaitIP waits until /health tells of an address.
func awaitIP(t *testing.T, p *proxytest.Proxy, ip netip.Addr) {
	t.Helper()
	want := `"tailnet_ip":"` + ip.String() + `"`
	within(t, soon, want, func() bool {
		_, body, err := p.Health()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(body), want)
	})
}
