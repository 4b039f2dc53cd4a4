package tailnet_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// retries are the pauses between attempts to connect, in seconds.
var retries = []float64{1, 2, 4, 8, 16}

// retriesTotal is how long the retries last in all. No attempt adds more than
// retriesSlack to it, on a busy machine and with a daemon that never answers.
const (
	retriesTotal = 31 * time.Second
	retriesSlack = 40 * time.Second
)

// nothing is a step that a case does not need.
func nothing(*fixture) {}

// TestStartFailures brings about each error for which the proxy gives up, by its
// real cause.
func TestStartFailures(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		options tailnet.Options
		before  func(*fixture) // leads up to the cause, before the proxy is started
		after   func(*fixture) // … after
		want    string         // the error's name
		wording string         // the runbook's words for it
	}{
		{
			name:    "wrong auth key before the start",
			options: tailnet.Options{AuthKey: rightKey},
			before: func(f *fixture) {
				f.start(f.sidecar)
				if err := f.sidecar.Up(f.ctx, wrongKey); err == nil {
					f.t.Fatal("the wrong key was accepted")
				}
			},
			after:   nothing,
			want:    "TailnetAuth",
			wording: "Tailnet authentication failed",
		},
		{
			name:    "wrong auth key after the start",
			options: tailnet.Options{AuthKey: rightKey},
			before:  func(f *fixture) { f.start(f.sidecar) },
			after:   func(f *fixture) { f.login(wrongKey) },
			want:    "TailnetAuth",
			wording: "Tailnet authentication failed",
		},
		{
			name:    "wrong auth key under containerboot",
			options: tailnet.Options{AuthKey: rightKey},
			before: func(f *fixture) {
				f.inBackground(func(ctx context.Context) {
					if err := f.sidecar.KeepBooting(ctx, wrongKey); err != nil {
						f.t.Error(err)
					}
				})
			},
			after:   nothing,
			want:    "TailnetAuth",
			wording: "Tailnet authentication failed",
		},
		{
			name:    "machine approval pending",
			options: tailnet.Options{ApproveMachines: true},
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.login("")
			},
			after:   nothing,
			want:    "TailnetMachineAuth",
			wording: "Tailnet needs machine authorization",
		},
		{
			name:    "no socket",
			before:  nothing,
			after:   nothing,
			want:    "TailnetNotRunning",
			wording: "Tailnet daemon not running",
		},
		{
			name: "dead socket",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Kill())
			},
			after:   nothing,
			want:    "TailnetNotRunning",
			wording: "Tailnet daemon not running",
		},
		{
			name: "hung daemon",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Stop())
			},
			after:   nothing,
			want:    "TailnetNotRunning",
			wording: "Tailnet daemon not running",
		},
		{
			name: "tailscale down",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Down(f.ctx))
			},
			after:   nothing,
			want:    "TailnetNotRunning",
			wording: "Tailnet daemon not running",
		},
		{
			name: "control server down, new node",
			before: func(f *fixture) {
				f.do(f.tailnet.Control.Stop())
				f.start(f.sidecar)
				f.login("")
			},
			after:   nothing,
			want:    "TailnetConnect",
			wording: "Tailnet connection failed",
		},
		{
			name: "control server down, known node",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Terminate())
				f.do(f.tailnet.Control.Stop())
				f.start(f.sidecar)
			},
			after:   nothing,
			want:    "TailnetConnect",
			wording: "Tailnet connection failed",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tt.options)
			tt.before(f)
			p := f.launch("")
			f.do(p.WaitListening(proxytest.Timeout))
			tt.after(f)
			checkHealth(t, p, http.StatusServiceUnavailable, degraded)

			code, err := p.Wait(retriesTotal + retriesSlack)
			lasted := time.Since(p.Started)
			f.do(err)
			t.Logf("gave up after %v", lasted)
			if code != 1 || lasted < retriesTotal {
				t.Errorf("exit code %d after %v, want 1 after %v or more", code, lasted, retriesTotal)
			}
			checkRetries(t, p)
			checkLastWords(t, p, tt.want, tt.wording)
		})
	}
}

// checkRetries checks that every retry was announced and came when announced.
func checkRetries(t *testing.T, p *proxytest.Proxy) {
	t.Helper()
	lines := retryLines(p)
	var announced []float64
	for i, line := range lines {
		announced = append(announced, line.Number("retry_in_secs"))
		if line.Text("error") == "" {
			t.Errorf("a retry does not say why: %s", line.Raw)
		}
		if i > 0 {
			pause, want := logged(t, line).Sub(logged(t, lines[i-1])), time.Duration(announced[i-1])*time.Second
			if pause < want-10*time.Millisecond { // the stamps are cut to milliseconds
				t.Errorf("retry %d came after %v, want %v", i, pause, want)
			}
		}
	}
	if !slices.Equal(announced, retries) {
		t.Errorf("retry_in_secs were %v, want %v:\n%s", announced, retries, p.Stdout())
	}
}

// logged returns when a line says that it was written.
func logged(t *testing.T, line proxytest.Line) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, line.Text("timestamp"))
	if err != nil {
		t.Error(err)
	}
	return at
}

// retryLines returns the lines that announce a retry.
func retryLines(p *proxytest.Proxy) []proxytest.Line {
	return linesWith(p, func(l proxytest.Line) bool { return l.Number("retry_in_secs") > 0 })
}

// checkLastWords checks that exactly one line tells why the proxy gave up, with
// the error's name and the runbook's wording, and no other error's.
func checkLastWords(t *testing.T, p *proxytest.Proxy, name, wording string) {
	t.Helper()
	fatal := linesWith(p, func(l proxytest.Line) bool { return l.Text("level") == "ERROR" })
	if len(fatal) != 1 {
		t.Fatalf("%d lines of level ERROR, want 1:\n%s", len(fatal), p.Stdout())
	}
	t.Log(fatal[0].Raw)
	if !namesError(fatal[0], name) || !strings.Contains(fatal[0].Raw, wording) || fatal[0].Text("hint") == "" {
		t.Errorf("gave up with %s\nwant %s, %q and a hint", fatal[0].Raw, name, wording)
	}
}

// namesError reports whether the line has this error name and no other one.
func namesError(line proxytest.Line, want string) bool {
	for _, name := range []string{"TailnetAuth", "TailnetMachineAuth", "TailnetNotRunning", "TailnetConnect"} {
		if strings.Contains(line.Raw, name) != (name == want) {
			return false
		}
	}
	return true
}

// TestStartRecoveries lets the cause of a failing start end, each once the proxy
// has started an 8 s pause: it must not sleep through what it waits for.
func TestStartRecoveries(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		options tailnet.Options
		before  func(*fixture) // brings the cause about
		mend    func(*fixture) // ends it
	}{
		{
			name:    "a retried auth key",
			options: tailnet.Options{AuthKey: rightKey},
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.login(wrongKey)
			},
			mend: func(f *fixture) {
				// The daemon still tries the wrong key, and may fail the next Up for it.
				within(f.t, soon, "the login with the right key", func() bool {
					return f.sidecar.Up(f.ctx, rightKey) == nil
				})
			},
		},
		{
			name:    "machine approval",
			options: tailnet.Options{ApproveMachines: true},
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.login("")
			},
			mend: func(f *fixture) { f.do(f.tailnet.Control.Approve(f.ctx, f.sidecar)) },
		},
		{
			name:   "a daemon that starts late",
			before: nothing,
			mend:   func(f *fixture) { f.connect(f.sidecar) },
		},
		{
			name: "a daemon that died and starts again",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Kill())
			},
			mend: func(f *fixture) { f.start(f.sidecar) },
		},
		{
			name: "a daemon that hung",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Stop())
			},
			mend: func(f *fixture) { f.do(f.sidecar.Cont()) },
		},
		{
			name: "tailscale up",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Down(f.ctx))
			},
			mend: func(f *fixture) { f.do(f.sidecar.Up(f.ctx, "")) },
		},
		{
			name: "the control server comes back",
			before: func(f *fixture) {
				f.do(f.tailnet.Control.Stop())
				f.start(f.sidecar)
				f.login("")
			},
			mend: func(f *fixture) { f.do(f.tailnet.Control.Start()) },
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tt.options)
			tt.before(f)
			p := f.launch("")
			f.do(p.WaitListening(proxytest.Timeout))
			_, err := p.WaitLine("retry_in_secs 8", retriesTotal, func(l proxytest.Line) bool {
				return l.Number("retry_in_secs") == 8
			})
			f.do(err)
			tt.mend(f)
			f.await(ipn.Running)
			took := follows(t, p, soon, true)
			t.Logf("healthy %v after the daemon ran", took)
			if took >= 5*time.Second {
				t.Errorf("healthy only %v after the daemon ran: it slept on", took)
			}
			f.do(p.WaitRunning(proxytest.Timeout))
			if n := len(retryLines(p)); n > 4 {
				t.Errorf("%d retries announced, want 4: it slept on", n)
			}
			if status, body := post(t, http.DefaultClient, p.URL()); status != http.StatusOK {
				t.Errorf("status %d: %s", status, body)
			}
		})
	}
}

// TestSlowLogin: a login that takes some seconds is the ordinary case.
func TestSlowLogin(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		login func(*fixture)
	}{
		{"tailscaled", func(f *fixture) {
			f.start(f.sidecar)
			f.login(rightKey)
		}},
		{"containerboot", func(f *fixture) { f.do(f.sidecar.Boot(rightKey)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			const delay = 10 * time.Second
			f := setUp(t, tailnet.Options{AuthKey: rightKey})
			f.tailnet.Control.SetLoginDelay(delay)
			p := f.launch("")
			tt.login(f)
			f.do(p.WaitRunning(delay + proxytest.Timeout))
			t.Logf("running after %v", time.Since(p.Started))
			if lasted := time.Since(p.Started); lasted < delay {
				t.Errorf("running after %v, before the login can have ended", lasted)
			}
			if lines := linesWith(p, func(l proxytest.Line) bool { return l.Text("level") == "ERROR" }); len(lines) > 0 {
				t.Errorf("a slow login was logged as an error: %v", lines)
			}
			follows(t, p, soon, true)
		})
	}
}

// TestSIGTERMWhileConnecting: a pod may be deleted before it is connected.
func TestSIGTERMWhileConnecting(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.launch("")
	_, err := p.WaitLine("retry_in_secs 4", retriesTotal, func(l proxytest.Line) bool {
		return l.Number("retry_in_secs") == 4
	})
	f.do(err)
	start := time.Now()
	f.do(p.Signal(syscall.SIGTERM))
	code, err := p.Wait(soon)
	f.do(err)
	t.Logf("ended after %v", time.Since(start))
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	for _, message := range []string{proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete} {
		proxytest.WaitLog(t, p, message)
	}
}
