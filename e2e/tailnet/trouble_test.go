package tailnet_test

import (
	"cmp"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// A trouble keeps the sidecar from its tailnet, or takes it away.
type trouble struct {
	name      string
	options   tailnet.Options
	connected bool           // the sidecar was in its tailnet before
	error     string         // its name in the log
	passing   string         // another, by which a loss may be logged: the daemon is for a second and more on its way
	check     string         // what -check says of the daemon
	unnoticed time.Duration  // how long a proxy that runs may not know of it; if 0, soon
	begin     func(*fixture) // returns when the daemon knows; nil: there is nothing to do
	late      func(*fixture) // the rest of it, which comes once the proxy listens
	end       func(*fixture) // if it has one
}

var troubles = []trouble{
	{name: "no daemon yet", error: "TailnetNotRunning", check: "no such file",
		end: func(f *fixture) { f.connect(f.sidecar) }},
	{name: "SIGKILL and restart", connected: true, error: "TailnetNotRunning", check: "refused",
		begin: func(f *fixture) { f.do(f.sidecar.End(syscall.SIGKILL)) },
		end:   func(f *fixture) { f.do(f.sidecar.Start()) }},
	{name: "SIGTERM and restart", connected: true, error: "TailnetNotRunning", check: "no such file",
		begin: func(f *fixture) { f.do(f.sidecar.End(syscall.SIGTERM)) },
		end:   func(f *fixture) { f.do(f.sidecar.Start()) }},
	{name: "SIGSTOP and SIGCONT", connected: true, error: "TailnetNotRunning", check: "does not answer", unnoticed: 20 * time.Second,
		begin: func(f *fixture) { f.do(f.sidecar.Signal(syscall.SIGSTOP)) },
		end:   func(f *fixture) { f.do(f.sidecar.Signal(syscall.SIGCONT)) }},
	{name: "tailscale down and up", connected: true, error: "TailnetNotRunning", check: "TailnetNotRunning",
		begin: func(f *fixture) {
			f.do(f.sidecar.Tailscale(f.Context(), "down"))
			f.do(f.sidecar.Await(ipn.Stopped))
		},
		end: func(f *fixture) { f.do(f.sidecar.Up(f.Context(), "")) }},
	{name: "key expiry and extension", connected: true, error: "TailnetAuth", check: "TailnetAuth",
		begin: func(f *fixture) {
			f.do(f.tailnet.Control.SetMemberExpiry(hostname, time.Now().Add(-time.Minute)))
			f.do(f.sidecar.Await(ipn.NeedsLogin))
		},
		end: func(f *fixture) { f.do(f.tailnet.Control.SetMemberExpiry(hostname, time.Now().Add(time.Hour))) }},
	{name: "logout and login", connected: true, error: "TailnetAuth", passing: "TailnetConnect", check: "TailnetAuth",
		begin: func(f *fixture) {
			f.do(f.sidecar.Tailscale(f.Context(), "logout"))
			f.do(f.sidecar.Await(ipn.NeedsLogin))
		},
		end: func(f *fixture) {
			f.do(f.sidecar.Up(f.Context(), ""))
			if ip := f.self(f.sidecar).IP; ip == "100.64.0.1" { // who logs in anew is another node
				f.Fatalf("the node kept its address %s: that the proxy knows it proves nothing", ip)
			}
		}},
	{name: "wrong auth key", options: keyed, error: "TailnetAuth", check: "TailnetAuth",
		begin: func(f *fixture) {
			f.do(f.sidecar.Start())
			wrongLogin(f)
		},
		end: rightLogin},
	{name: "wrong auth key once the proxy listens", options: keyed, error: "TailnetAuth", check: "TailnetAuth",
		begin: func(f *fixture) { f.do(f.sidecar.Start()) },
		late:  wrongLogin,
		end:   rightLogin},
	{name: "wrong auth key under containerboot", options: keyed, error: "TailnetAuth",
		late: func(f *fixture) { // else the proxy, if it is built meanwhile, may spend all its retries between two boots
			var booting sync.WaitGroup
			booting.Go(func() {
				if err := f.sidecar.KeepBooting(f.Context(), "TS_AUTHKEY="+wrongKey); err != nil {
					f.Error(err)
				}
			})
			f.Cleanup(booting.Wait) // the context has ended by then
		}},
	{name: "machine approval pending, under containerboot", options: tailnet.Options{ApproveMachines: true},
		error: "TailnetMachineAuth", check: "TailnetMachineAuth",
		late: func(f *fixture) {
			f.do(f.sidecar.BootWith("TS_AUTHKEY=" + rightKey))
			f.do(f.sidecar.Await(ipn.NeedsMachineAuth))
		},
		end: func(f *fixture) {
			proxytest.Eventually(f.T, "a node to approve", func() bool { return f.tailnet.Control.ApproveAll() > 0 })
		}},
	{name: "control server down, new node", error: "TailnetConnect",
		begin: func(f *fixture) {
			f.tailnet.Control.Stop()
			f.do(f.sidecar.Start())
			go f.sidecar.Up(f.Context(), "") // which waits
		},
		end: func(f *fixture) { f.tailnet.Control.Start() }},
	{name: "control server down, known node", error: "TailnetConnect", check: "TailnetConnect",
		begin: func(f *fixture) {
			f.connect(f.sidecar)
			f.do(f.sidecar.End(syscall.SIGTERM))
			f.tailnet.Control.Stop()
			f.do(f.sidecar.Start())
		},
		end: func(f *fixture) { f.tailnet.Control.Start() }},
}

// keyed is a tailnet that asks for a key.
var keyed = tailnet.Options{AuthKey: rightKey}

// wordings are the runbook's words for the errors.
var wordings = map[string]string{
	"TailnetAuth":        "Tailnet authentication failed",
	"TailnetMachineAuth": "Tailnet needs machine authorization",
	"TailnetNotRunning":  "Tailnet daemon not running",
	"TailnetConnect":     "Tailnet connection failed",
}

func wrongLogin(f *fixture) {
	f.Helper()
	if f.sidecar.Up(f.Context(), wrongKey) == nil {
		f.Fatal("the wrong key was accepted")
	}
}

func rightLogin(f *fixture) {
	f.Helper()
	// The daemon still tries the wrong key, and may fail the next Up for it.
	proxytest.Eventually(f.T, "a login with the right key", func() bool { return f.sidecar.Up(f.Context(), rightKey) == nil })
}

// meet launches the proxy into the trouble.
func (tt trouble) meet(t *testing.T) *fixture {
	t.Helper()
	f := setUp(t, tt.options)
	if tt.connected {
		f.connect(f.sidecar)
	}
	for _, step := range []func(*fixture){tt.begin, func(f *fixture) { f.launch(f.sidecar, "") }, tt.late} {
		if step != nil {
			step(f)
		}
	}
	f.awaitHealth(degraded)
	return f
}

// namesError reports whether a line has the error's name, and what to do.
func namesError(line proxytest.Line, name string) bool {
	return strings.HasPrefix(line.Text("error"), name+": ") && line.Text("hint") != ""
}

// The pauses between attempts to connect, in seconds; how long they last in all; and what that may take on a busy machine, with
// a daemon that never answers.
var (
	retries      = []float64{1, 2, 4, 8, 16}
	retriesTotal = 31 * time.Second
	retriesLimit = 70 * time.Second
)

// awaitRetry waits until a pause has begun.
func (f *fixture) awaitRetry(seconds float64) {
	f.Helper()
	_, err := f.Proxy.WaitLine("the retry", retriesTotal, func(l proxytest.Line) bool { return l.Number("retry_in_secs") == seconds })
	f.do(err)
}

// doctor runs -check beside the sidecar. It returns the exit code, the steps that it came to, and its line about tailscaled.
func (f *fixture) doctor() (code int, steps, tailscaled string) {
	f.Helper()
	got := proxytest.Exec(f.T, f.options(f.sidecar, "", "-check"))
	for line := range strings.Lines(got.Stdout) {
		step, _, _ := strings.Cut(line, " ")
		steps += step + " "
		if step == "tailscaled" {
			tailscaled = line
		}
	}
	return got.Code, strings.TrimSpace(steps), tailscaled
}

// TestStartFailures: a proxy that does not get connected gives up, for a reason that it names, as does the doctor.
func TestStartFailures(t *testing.T) {
	t.Parallel()
	for _, tt := range troubles {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := tt.meet(t)
			if code, steps, said := f.doctor(); code != 1 || steps != "config tailscaled" || !strings.Contains(said, tt.check) {
				t.Errorf("-check ends with %d at %q: %swant 1 at tailscaled, and %q", code, steps, said, tt.check)
			}

			code, err := f.Proxy.Wait(retriesLimit)
			f.do(err)
			if lasted := time.Since(f.Proxy.Started); code != 1 || lasted < retriesTotal {
				t.Errorf("exit code %d after %v, want 1 after %v or more", code, lasted, retriesTotal)
			}
			var announced []float64
			for _, line := range f.Proxy.Logs() {
				if s := line.Number("retry_in_secs"); s > 0 && line.Text("error") != "" {
					announced = append(announced, s)
				}
			}
			if !slices.Equal(announced, retries) {
				t.Errorf("with a reason, retry_in_secs were %v, want %v", announced, retries)
			}
			fatal := linesWith(f.Proxy, "level", "ERROR")
			if len(fatal) != 1 || !namesError(fatal[0], tt.error) || fatal[0].Message() != wordings[tt.error] {
				t.Errorf("gave up with %v, want one line with %s, %q and a hint", fatal, tt.error, wordings[tt.error])
			}
		})
	}
}

// TestStartRecoveries: requests before the first connection are refused, to come again. Each trouble ends when the proxy
// has begun a pause of 8 s: it must not sleep through what it waits for.
func TestStartRecoveries(t *testing.T) {
	t.Parallel()
	for _, tt := range troubles {
		if tt.end == nil {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := tt.meet(t)
			f.follows(false, soon)
			if a := f.Post(); a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
				t.Errorf("status %d, headers %v; want 503 with Retry-After", a.StatusCode, a.Header)
			}
			f.awaitRetry(8)
			tt.end(f)
			f.do(f.sidecar.Await(ipn.Running))
			f.follows(true, soon)
			f.do(f.Proxy.WaitRunning(soon))
			f.served(f.Client, f.Proxy.URL())
			f.upstreamGot(1)
			if lines := linesWith(f.Proxy, "level", "ERROR"); len(lines) > 0 {
				t.Errorf("it was logged as an error: %v", lines)
			}
		})
	}
}

// watchFor is how long a lost proxy is watched for a log line too many: longer than the longest pause between two
// attempts to reach the daemon, which is 2 s.
const watchFor = 5 * time.Second

// TestTailnetLostAndRegained takes the tailnet away from a running proxy, which tells, goes on serving, and tells when
// it is back.
func TestTailnetLostAndRegained(t *testing.T) {
	t.Parallel()
	for _, tt := range troubles {
		if !tt.connected {
			continue
		}
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tt.options)
			f.connected("")
			next, finish := f.stream(http.DefaultClient, f.Proxy.URL())

			tt.begin(f)
			f.follows(false, cmp.Or(tt.unnoticed, soon))
			f.served(f.Client, f.Proxy.URL())
			next()
			finish()
			time.Sleep(watchFor)

			tt.end(f)
			f.do(f.sidecar.Await(ipn.Running))
			f.follows(true, cmp.Or(tt.unnoticed, soon))
			f.awaitHealth(`"tailnet_ip":"` + f.self(f.sidecar).IP + `"`)
			f.served(f.Client, f.Proxy.URL())
			proxytest.WaitLog(t, f.Proxy, "tailnet connected again")
			// One line, and not one for every attempt to reach the daemon or every state on its way.
			said := complaints(f.Proxy)
			if len(said) != 1 || !namesError(said[0], tt.error) && (tt.passing == "" || !namesError(said[0], tt.passing)) {
				t.Errorf("the loss was logged as %v, want one line that names %s", said, tt.error)
			}
		})
	}
}
