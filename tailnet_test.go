package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// Health texts as tailscaled 1.102 words them.
const (
	healthStore   = "State store failed to initialize, Tailscale will not work until this is resolved. See x. Error: permission denied"
	healthControl = `You are logged out. The last login error was: fetch control key: Get "https://c/key": dial tcp: connection refused`
	healthKey     = "You are logged out. The last login error was: invalid authkey"
)

// seen builds an event; from is when a poll was begun, for those that are answers to one.
type seen func(now time.Time) event

// bus is a notice of a state.
func bus(s ipn.State) seen {
	return func(time.Time) event { return event{notice: &notice{State: &s}} }
}

// busError is control's refusal of a login.
func busError(message string) seen {
	return func(time.Time) event { return event{notice: &notice{ErrMessage: &message}} }
}

// busHealth is a health report.
func busHealth(texts ...string) seen {
	return func(time.Time) event {
		var n notice
		warnings := map[string]any{}
		for i, text := range texts {
			warnings[fmt.Sprint("w", i)] = map[string]string{"Text": text}
		}
		src, _ := json.Marshal(map[string]any{"Health": map[string]any{"Warnings": warnings}})
		json.Unmarshal(src, &n)
		return event{notice: &n}
	}
}

// busJSON is a notice as it comes over the wire.
func busJSON(text string) seen {
	return func(time.Time) event {
		var n notice
		if err := json.Unmarshal([]byte(text), &n); err != nil {
			panic(err)
		}
		return event{notice: &n}
	}
}

// busEnd is the end of the bus.
func busEnd(text string) seen { return func(time.Time) event { return event{err: errors.New(text)} } }

// poll is a status, asked for age before it came.
func poll(age time.Duration, backend string, health ...string) seen {
	return func(now time.Time) event {
		return event{status: daemonStatus(backend, "node-1.x.ts.net.", health...), asked: now.Add(-age)}
	}
}

// pollFails is a poll that failed, asked age before.
func pollFails(age time.Duration, text string) seen {
	return func(now time.Time) event { return event{err: errors.New(text), asked: now.Add(-age)} }
}

// daemonStatus is what tailscaled says of itself.
func daemonStatus(backend, dnsName string, health ...string) *ipnstate.Status {
	return &ipnstate.Status{BackendState: backend, Health: health, TailscaleIPs: []netip.Addr{netip.MustParseAddr("100.1.2.3"), netip.MustParseAddr("fd7a::1")},
		Self: &ipnstate.PeerStatus{DNSName: dnsName, HostName: "node", Online: true}}
}

// verdict describes a state: "-" for none yet, the name, or the problem.
func verdict(s *tailnetState) string {
	switch {
	case s == nil:
		return "-"
	case s.problem != nil:
		return s.problem.Error()
	}
	return "connected as " + s.hostname + " " + s.ip
}

// TestView holds the state machine against what real daemons were seen to do (field notes): each
// step says what is seen, how much time passed before it, and what is concluded.
func TestView(t *testing.T) {
	const (
		connected = "connected as node-1 100.1.2.3"
		login     = "TailnetConnect: tailscaled is not logged in"
		stopped   = "TailnetNotRunning: tailscaled is stopped (tailscale down): run tailscale up"
		expired   = "TailnetAuth: the node's key has expired, or it was logged out"
		approval  = "TailnetMachineAuth: the node awaits approval"
		refusal   = "TailnetAuth: invalid authkey"
	)
	type step struct {
		after time.Duration
		see   seen // nil: only time passes
		want  string
		again bool // another poll is wanted
	}
	for _, row := range []struct {
		name  string
		steps []step
	}{
		{name: "nothing yet", steps: []step{{want: "-"}}},
		{name: "socket absent", steps: []step{
			{see: busEnd("connect: no such file or directory"), want: "TailnetNotRunning: connect: no such file or directory"},
			{see: pollFails(time.Millisecond, "x"), want: "TailnetNotRunning: connect: no such file or directory", again: true},
			{after: time.Second, see: pollFails(time.Millisecond, "still absent"), want: "TailnetNotRunning: still absent"}}},
		{name: "daemon hung while running", steps: []step{
			{see: bus(ipn.Running), want: "-", again: true}, {after: time.Second, see: poll(0, "Running"), want: connected},
			{after: 13 * time.Second, see: pollFails(3*time.Second, "tailscaled does not answer on /s"), want: "TailnetNotRunning: tailscaled does not answer on /s"},
			{after: time.Second, see: poll(0, "Running"), want: connected}}},
		{name: "normal login", steps: []step{
			{see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true},
			{see: bus(ipn.NeedsLogin), want: login, again: true},
			{see: poll(0, "NeedsLogin"), want: login},
			{see: busJSON(`{"LoginFinished":{}}`), want: login},
			{see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true},
			{see: bus(ipn.Running), want: "-", again: true},
			{after: time.Millisecond, see: poll(0, "Running"), want: connected}}},
		{name: "known by polls alone", steps: []step{{see: poll(0, "Starting"), want: "TailnetConnect: tailscaled is in state Starting"}, {see: poll(0, "Running"), want: connected}}},
		{name: "bad key", steps: []step{
			{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busError("invalid authkey"), want: refusal},
			{after: time.Second, see: poll(0, "NeedsLogin", healthKey), want: refusal},
			{see: busError("invalid authkey"), want: refusal},
			{see: busEnd("EOF"), want: refusal}, // the daemon exits over it
			{after: time.Minute, see: pollFails(0, "ENOENT"), want: refusal}}},
		{name: "bad key, seen by polls alone", steps: []step{{see: poll(0, "NeedsLogin", "other", healthKey), want: "TailnetAuth: " + healthKey}, {see: poll(0, "NeedsLogin"), want: login}}},
		{name: "bad key that heals", steps: []step{
			{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busError("invalid authkey"), want: refusal},
			{see: busJSON(`{"LoginFinished":{}}`), want: login}}},
		{name: "bad key cleared by Running", steps: []step{
			{see: busError("invalid authkey"), want: "-"}, {see: bus(ipn.NeedsLogin), want: refusal, again: true},
			{see: poll(0, "Running"), want: connected}, {see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}}},
		{name: "an error while running means nothing", steps: []step{{see: poll(0, "Running"), want: connected}, {see: busError("x"), want: connected}, {see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}}},
		{name: "slow consumer", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busError("IPN bus consumer fell behind"), want: login}}},
		{name: "approval needed", steps: []step{
			{see: bus(ipn.NeedsMachineAuth), want: approval, again: true}, {after: time.Second, see: poll(0, "NeedsMachineAuth"), want: approval},
			{see: busEnd("EOF"), want: approval}, {see: bus(ipn.Starting), want: approval, again: true},
			{after: time.Second, see: poll(0, "Running"), want: connected}, {see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true}}},
		{name: "control unreachable at start", steps: []step{
			{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busHealth("b", healthControl, "a"), want: "TailnetConnect: " + healthControl},
			{see: busHealth(), want: login}}},
		{name: "control unreachable with state", steps: []step{
			{see: poll(0, "NoState", healthControl), want: "TailnetConnect: " + healthControl}, {see: poll(0, "NoState"), want: "TailnetConnect: tailscaled is in state NoState"}}},
		{name: "control unreachable at the second step of a login", steps: []step{
			{see: poll(0, "NeedsLogin", "You are logged out. The last login error was: register request: http 503"),
				want: "TailnetConnect: You are logged out. The last login error was: register request: http 503"}}},
		{name: "control lost while running", steps: []step{
			{see: poll(0, "Running"), want: connected},
			{see: func(now time.Time) event {
				status := daemonStatus("Running", "node-1.x.ts.net.")
				status.Self.Online = false
				return event{status: status, asked: now}
			}, want: connected}}},
		{name: "daemon killed, and back", steps: []step{
			{see: poll(0, "Running"), want: connected}, {after: time.Second, see: busEnd("unexpected EOF"), want: "TailnetNotRunning: unexpected EOF"},
			{after: time.Second, see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true},
			{see: bus(ipn.Running), want: "-", again: true}, {after: time.Second, see: poll(0, "Running"), want: connected}}},
		{name: "bus ends and comes back to a running daemon", steps: []step{
			{see: poll(0, "Running"), want: connected}, {after: time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}, {after: time.Second, see: bus(ipn.Running), want: connected, again: true}}},
		{name: "down and up", steps: []step{
			{see: poll(0, "Running"), want: connected}, {see: bus(ipn.Stopped), want: stopped, again: true}, {after: time.Second, see: poll(0, "Stopped"), want: stopped},
			{see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true}, {see: bus(ipn.Running), want: "-", again: true},
			{after: time.Second, see: poll(0, "Running"), want: connected}}},
		{name: "stopped at start: only for a while", steps: []step{
			{see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true},
			{after: 3 * time.Second, see: poll(0, "Stopped"), want: "TailnetConnect: tailscaled is in state Stopped"},
			{after: 2*time.Second - 1, want: "TailnetConnect: tailscaled is in state Stopped"}, {after: 1, want: stopped},
			{see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true},
			{after: time.Hour, see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}}},
		{name: "stopped, lost, and stopped again: the grace starts anew", steps: []step{
			{see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}, {after: 4 * time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"},
			{after: time.Second, see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}, {after: 5 * time.Second, want: stopped}}},
		{name: "key expired by control", steps: []step{{see: poll(0, "Running"), want: connected}, {see: bus(ipn.NeedsLogin), want: expired, again: true}, {after: time.Second, see: poll(0, "NeedsLogin"), want: expired}}},
		{name: "state folder unusable", steps: []step{
			{see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true}, {see: busHealth("x", healthStore), want: "TailnetNotRunning: " + healthStore},
			{after: time.Second, see: poll(0, "NoState", healthStore, "a"), want: "TailnetNotRunning: " + healthStore}}},

		{name: "a poll overtaken by the bus says nothing", steps: []step{
			{see: poll(0, "Running"), want: connected}, {after: time.Second, see: bus(ipn.Stopped), want: stopped, again: true},
			{after: time.Millisecond, see: poll(2*time.Millisecond, "Running"), want: stopped, again: true},
			{after: time.Millisecond, see: pollFails(3*time.Millisecond, "x"), want: stopped, again: true},
			{after: time.Millisecond, see: poll(time.Millisecond, "Running"), want: connected}}},
		{name: "a poll overtaken by the end of the bus", steps: []step{
			{after: time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}, {after: 1, see: poll(2, "Running"), want: "TailnetNotRunning: EOF", again: true}}},
		{name: "a rename on the bus asks for a poll", steps: []step{
			{see: poll(0, "Running"), want: connected}, {see: busJSON(`{"SelfChange":{"Name":"x"}}`), want: connected, again: true},
			{see: func(now time.Time) event {
				return event{status: daemonStatus("Running", "other.x.ts.net."), asked: now}
			}, want: "connected as other 100.1.2.3"}}},
		{name: "a state that is new to this client", steps: []step{{see: poll(0, "Hibernating"), want: "TailnetConnect: tailscaled is in state NoState"}}},
		{name: "running, but without itself", steps: []step{{see: func(now time.Time) event { return event{status: &ipnstate.Status{BackendState: "Running"}, asked: now} }, want: "-"}}},
		{name: "a notice of nothing that matters", steps: []step{{see: busJSON(`{"Version":"1","NetMap":{"x":1},"Prefs":null}`), want: "-"}}},
	} {
		t.Run(row.name, func(t *testing.T) {
			v, now := &view{}, time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
			for i, step := range row.steps {
				now = now.Add(step.after)
				again := false
				if step.see != nil {
					again = v.take(step.see(now), now)
				}
				if got := verdict(v.state(now)); got != step.want || again != step.again {
					t.Fatalf("step %d: %s, poll again: %t\nwant    %s, %t", i, got, again, step.want, step.again)
				}
			}
		})
	}
}

// TestViewIdentity: name, address, control and key expiry come from the daemon's status.
func TestViewIdentity(t *testing.T) {
	expiry := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	status := daemonStatus("Running", "anthropic-oauth-proxy-1.tail.ts.net.")
	status.Self.KeyExpiry = &expiry
	v, now := &view{}, time.Now()
	v.take(event{status: status, asked: now}, now)
	if got, want := *v.state(now), (tailnetState{hostname: "anthropic-oauth-proxy-1", ip: "100.1.2.3", online: true, keyExpiry: expiry}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// newTestTailnet returns a tailnet that nothing follows, and its log.
func newTestTailnet() (*tailnet, *logRecorder) {
	var log logRecorder
	return newTailnet("/nowhere", "node-1", log.syncLogger()), &log
}

// TestConnect holds the retries to the clock: looks after 1, 2, 4, 8 and 16 s, an end at once when the
// connection comes, and the right name when it does not.
func TestConnect(t *testing.T) {
	lacks := func(kind *problemKind, detail string) *tailnetState {
		return &tailnetState{problem: &problem{kind, detail}}
	}
	connected := &tailnetState{hostname: "node-1", ip: "100.1.2.3"}
	retries := []time.Duration{0, 1 * time.Second, 3 * time.Second, 7 * time.Second, 15 * time.Second}
	type change struct {
		at    time.Duration
		state *tailnetState
	}
	for _, row := range []struct {
		name    string
		changes []change
		cancel  time.Duration
		retries []time.Duration
		took    time.Duration
		want    string // the error
	}{
		{name: "at once", changes: []change{{0, connected}}},
		{name: "wakes up at once", changes: []change{{0, lacks(tailnetConnect, "x")}, {1234 * time.Millisecond, connected}}, retries: retries[:2], took: 1234 * time.Millisecond},
		{name: "in the last pause", changes: []change{{0, lacks(tailnetConnect, "x")}, {31*time.Second - 1, connected}}, retries: retries, took: 31*time.Second - 1},
		{name: "connected and lost again within a pause", changes: []change{{0, lacks(tailnetConnect, "x")}, {2 * time.Second, connected}, {2 * time.Second, lacks(tailnetConnect, "y")}},
			retries: retries[:2], took: 2 * time.Second},
		{name: "gives up", changes: []change{{0, lacks(tailnetConnect, "x")}}, retries: retries, took: 31 * time.Second, want: "TailnetConnect: x"},
		{name: "gives up with the last cause", changes: []change{{0, lacks(tailnetConnect, "x")}, {30 * time.Second, lacks(tailnetMachineAuth, "y")}}, retries: retries, took: 31 * time.Second, want: "TailnetMachineAuth: y"},
		{name: "a login that never came lacks a key", changes: []change{{0, lacks(tailnetConnect, awaitingLogin)}}, retries: retries, took: 31 * time.Second, want: "TailnetAuth: " + awaitingLogin},
		{name: "bad key is not given up early", changes: []change{{0, lacks(tailnetAuth, "invalid authkey")}}, retries: retries, took: 31 * time.Second, want: "TailnetAuth: invalid authkey"},
		{name: "nothing is ever seen", retries: []time.Duration{3 * time.Second, 4 * time.Second, 6 * time.Second, 10 * time.Second, 18 * time.Second}, took: 34 * time.Second,
			want: "TailnetNotRunning: tailscaled has not answered yet on /nowhere"},
		{name: "told to stop before anything is seen", cancel: time.Second, took: time.Second, want: "context canceled"},
		{name: "told to stop in a pause", changes: []change{{0, lacks(tailnetConnect, "x")}}, cancel: 5 * time.Second, retries: retries[:3], took: 5 * time.Second, want: "context canceled"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tn, log := newTestTailnet()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				start := time.Now()
				for _, c := range row.changes {
					if c.at == 0 {
						tn.publish(c.state)
						continue
					}
					time.AfterFunc(c.at, func() { tn.publish(c.state) })
				}
				if row.cancel > 0 {
					time.AfterFunc(row.cancel, cancel)
				}
				err := tn.connect(ctx)
				if took := time.Since(start); errorText(err) != row.want || took != row.took {
					t.Errorf("%v after %v; want %s after %v", err, took, row.want, row.took)
				}
				lines := log.lines(t, "Tailnet not connected yet, trying again")
				if len(lines) != len(row.retries) {
					t.Fatalf("%d retries, want %d", len(lines), len(row.retries))
				}
				for i, line := range lines {
					if at := line.time(t).Sub(start); at != row.retries[i] || line["retry"] != float64(i+1) || line["retry_in_secs"] != connectBackoff[i].Seconds() {
						t.Errorf("retry after %v: %v; want it after %v", at, line, row.retries[i])
					}
				}
			})
		})
	}
}

// TestProblemWords: the runbook's names and sentences.
func TestProblemWords(t *testing.T) {
	for kind, want := range map[*problemKind]string{
		tailnetAuth: "TailnetAuth: Tailnet authentication failed", tailnetMachineAuth: "TailnetMachineAuth: Tailnet needs machine authorization",
		tailnetNotRunning: "TailnetNotRunning: Tailnet daemon not running", tailnetConnect: "TailnetConnect: Tailnet connection failed",
	} {
		if got := kind.name + ": " + kind.message; got != want || kind.hint == "" {
			t.Errorf("%s (%s), want %s", got, kind.hint, want)
		}
	}
}

// TestTell: a loss is told once, when it has lasted for a second, and its end with how long it was.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tn, log := newTestTailnet()
		connected, lost := &tailnetState{hostname: "node-1", ip: "100.1.2.3"}, &tailnetState{problem: &problem{tailnetNotRunning, "first"}}
		see := func(s *tailnetState, want string) {
			t.Helper()
			tn.publish(s)
			tn.tell(s, time.Now())
			var got []string
			for _, line := range log.lines(t) {
				got = append(got, fmt.Sprint(line["level"], " ", line["message"], " ", line["error"], " ", line["lost_for_ms"]))
			}
			log.buf.Reset()
			if text := strings.Join(got, "\n"); text != want {
				t.Errorf("after %v: logged %q, want %q", time.Now(), text, want)
			}
		}
		see(lost, "") // at start that is connect's to tell
		time.Sleep(time.Minute)
		see(lost, "")
		see(connected, "")
		see(lost, "")
		time.Sleep(999 * time.Millisecond)
		see(connected, "INFO tailnet connected again <nil> 999")
		see(lost, "")
		time.Sleep(time.Second)
		cause := &tailnetState{problem: &problem{tailnetAuth, "real"}}
		see(cause, "WARN tailnet connection lost; requests that still arrive are served TailnetAuth: real <nil>")
		time.Sleep(time.Hour)
		see(lost, "")
		see(connected, "INFO tailnet connected again <nil> 3.601e+06")
		see(&tailnetState{hostname: "node-1-1"}, "WARN this node has another name than tailscale.hostname says; clients reach it under its actual name <nil> <nil>")
		see(&tailnetState{hostname: "node-1-1"}, "")
		see(connected, "")
	})
}

// daemon is a scripted tailscaled behind a pipe. End-to-end tests run the real one; this one can be
// as slow as a test wants, to the nanosecond.
type daemon struct {
	mu     sync.Mutex
	status *ipnstate.Status
	hung   bool
	whois  http.HandlerFunc
	polls  []time.Time
	dials  []time.Time // of the bus
	bus    chan string // notices; closed to end the bus
}

// followed starts a tailnet that follows d.
func followed(t *testing.T, d *daemon) (*tailnet, *logRecorder) {
	t.Helper()
	listener := newPipeListener()
	server := &http.Server{Handler: d}
	go server.Serve(listener)
	tn, log := newTestTailnet()
	transport := &http.Transport{DialContext: listener.dial, MaxIdleConnsPerHost: maxLookups}
	tn.client.Transport = transport
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { tn.follow(ctx) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
		transport.CloseIdleConnections()
		server.Close()
		time.Sleep(time.Minute) // for handlers that sleep
	})
	return tn, log
}

// ServeHTTP implements http.Handler.
func (d *daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d.mu.Lock()
	hung, bus := d.hung, d.bus
	switch r.URL.Path {
	case "/localapi/v0/status":
		d.polls = append(d.polls, time.Now())
	case "/localapi/v0/watch-ipn-bus":
		d.dials = append(d.dials, time.Now())
	}
	status, _ := json.Marshal(d.status)
	d.mu.Unlock()
	switch {
	case hung:
		<-r.Context().Done()
	case r.URL.Path == "/localapi/v0/status":
		w.Write(status)
	case r.URL.Path == "/localapi/v0/watch-ipn-bus":
		http.NewResponseController(w).Flush()
		for {
			select {
			case text, ok := <-bus:
				if !ok {
					return
				}
				io.WriteString(w, text+"\n")
				http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	case r.URL.Path == "/localapi/v0/whois":
		d.whois(w, r)
	}
}

// set changes the daemon.
func (d *daemon) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// TestFollow follows a daemon through its life.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{status: daemonStatus("NeedsLogin", ""), bus: make(chan string)}
		tn, _ := followed(t, d)
		expect := func(what, want string) {
			t.Helper()
			synctest.Wait()
			now := tn.current()
			if got := verdict(&now); got != want {
				t.Errorf("%s: %s, want %s", what, got, want)
			}
		}
		expect("at start", "TailnetConnect: tailscaled is not logged in")
		d.bus <- `{"State":2}`
		d.bus <- `{"ErrMessage":"invalid authkey"}`
		expect("bad key", "TailnetAuth: invalid authkey")
		time.Sleep(time.Millisecond) // polls and notices of one instant can't be told apart
		d.set(func() { d.status = daemonStatus("Running", "node-1.x.") })
		d.bus <- fmt.Sprintf(`{"LoginFinished":{},"State":%d}`, ipn.Running)
		expect("the bus reports Running: polled at once", "connected as node-1 100.1.2.3")
		if !tn.wasConnected() {
			t.Error("there was a connection")
		}

		d.set(func() { d.hung = true })
		start := time.Now()
		for tn.current().problem == nil && time.Since(start) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		if after := time.Since(start); after > 20*time.Second {
			t.Errorf("a hung daemon was found after %v, want 20s at most", after)
		} else {
			t.Logf("a hung daemon was found after %v", after)
		}
		expect("hung", "TailnetNotRunning: tailscaled does not answer on /nowhere")
		d.set(func() { d.hung = false })
		start = time.Now()
		for tn.current().problem != nil && time.Since(start) < time.Minute {
			time.Sleep(100 * time.Millisecond)
		}
		if after := time.Since(start); after > 20*time.Second {
			t.Errorf("its recovery was found after %v", after)
		} else {
			t.Logf("its recovery was found after %v", after)
		}
	})
}

// TestRedial: a bus that ends is dialled again every 100 ms until the first connection, then after pauses that
// grow to 500 ms.
func TestRedial(t *testing.T) {
	for name, row := range map[string]struct {
		backend string
		pauses  []time.Duration
	}{
		"before the first connection": {"NeedsLogin", []time.Duration{100 * time.Millisecond, 100 * time.Millisecond, 100 * time.Millisecond, 100 * time.Millisecond}},
		"after it":                    {"Running", []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 500 * time.Millisecond, 500 * time.Millisecond}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &daemon{status: daemonStatus(row.backend, "node-1."), bus: make(chan string)}
				followed(t, d)
				synctest.Wait()
				close(d.bus)
				start := time.Now()
				time.Sleep(3 * time.Second)
				d.mu.Lock()
				defer d.mu.Unlock()
				at := start
				for i, pause := range row.pauses {
					at = at.Add(pause)
					if got := d.dials[i+1]; !got.Equal(at) {
						t.Errorf("dial %d after %v, want %v", i+1, got.Sub(start), at.Sub(start))
					}
				}
			})
		})
	}
}

// TestPolls: every ten seconds, and no oftener while nothing happens.
func TestPolls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string)}
		followed(t, d)
		time.Sleep(65 * time.Second)
		d.mu.Lock()
		defer d.mu.Unlock()
		if len(d.polls) != 7 {
			t.Errorf("%d polls in 65 s, want 7: %v", len(d.polls), d.polls)
		}
	})
}
