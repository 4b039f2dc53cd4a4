package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// Health reports as tailscaled 1.102 sends them.
const (
	healthStore   = `{"state-store-health":{"Text":"State store failed","Args":{"error":"permission denied"}}}`
	healthControl = `{"a":{"Text":"b"},"login-state":{"Text":"You are logged out: no answer","Args":{"error":"fetch control key: Get \"https://c/key\": dial tcp: connection refused"}}}`
	healthStep2   = `{"login-state":{"Text":"You are logged out: no answer","Args":{"error":"register request: http 503"}}}`
	healthKey     = `{"login-state":{"Text":"You are logged out: invalid authkey","Args":{"error":"invalid authkey"}}}`
	healthLogin   = `{"login-state":{"Text":"You are logged out."}}`
)

// seen builds an event; from is when a poll was begun, for those that are answers to one.
type seen func(now time.Time) event

// busJSON is a notice as it comes over the wire: bus of a state, busError of control's refusal of a login, busHealth a health report.
func busJSON(format string, values ...any) seen {
	var n notice
	if err := json.Unmarshal(fmt.Appendf(nil, format, values...), &n); err != nil {
		panic(err)
	}
	return func(time.Time) event { return event{notice: &n} }
}

func bus(s ipn.State) seen           { return busJSON(`{"State":%d}`, s) }
func busError(message string) seen   { return busJSON(`{"ErrMessage":%q}`, message) }
func busHealth(warnings string) seen { return busJSON(`{"Health":{"Warnings":%s}}`, warnings) }
func busEnd(text string) seen        { return func(time.Time) event { return event{err: errors.New(text)} } }

// polled is the answer to a poll that was begun age before; poll is one of a daemon in the given state, pollSelf of a running one
// that says self of itself, pollFails a failure.
func polled(age time.Duration, status *ipnstate.Status, err error) seen {
	return func(now time.Time) event { return event{status: status, err: err, asked: now.Add(-age)} }
}

func poll(age time.Duration, backend string) seen {
	return polled(age, daemonStatus(backend, "node-1.x.ts.net."), nil)
}

func pollSelf(self ipnstate.PeerStatus) seen {
	status := daemonStatus("Running", "")
	status.Self = &self
	return polled(0, status, nil)
}

func pollFails(age time.Duration, text string) seen { return polled(age, nil, errors.New(text)) }

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
	text := "connected as " + s.hostname + " " + s.ip
	if !s.online {
		text += ", control lost"
	}
	if !s.keyExpiry.IsZero() {
		text += s.keyExpiry.Format(", until 2006")
	}
	return text
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

		unanswered = "TailnetConnect: You are logged out: no answer"
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
		{name: "socket absent", steps: []step{{see: busEnd("connect: no such file or directory"), want: "TailnetNotRunning: connect: no such file or directory"},
			{see: pollFails(time.Millisecond, "x"), want: "TailnetNotRunning: connect: no such file or directory", again: true},
			{after: time.Second, see: pollFails(time.Millisecond, "still absent"), want: "TailnetNotRunning: still absent"}}},
		{name: "normal login", steps: []step{{see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true}, {see: bus(ipn.NeedsLogin), want: login, again: true},
			{see: poll(0, "NeedsLogin"), want: login}, {see: busJSON(`{"LoginFinished":{}}`), want: login}, {see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true},
			{see: bus(ipn.Running), want: "-", again: true}, {after: time.Millisecond, see: poll(0, "Running"), want: connected}}},
		{name: "known by polls alone", steps: []step{{see: poll(0, "Starting"), want: "TailnetConnect: tailscaled is in state Starting"}, {see: poll(0, "Running"), want: connected}}},
		{name: "bad key", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busError("invalid authkey"), want: refusal},
			{after: time.Second, see: poll(0, "NeedsLogin"), want: refusal}, {see: busError("invalid authkey"), want: refusal}, {see: busEnd("EOF"), want: refusal}, // the daemon exits over it
			{after: time.Minute, see: pollFails(0, "ENOENT"), want: refusal}}},
		{name: "bad key, seen by the health report alone", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busHealth(healthKey), want: "TailnetAuth: You are logged out: invalid authkey"},
			{see: poll(0, "NeedsLogin"), want: "TailnetAuth: You are logged out: invalid authkey"}, {see: busHealth(healthLogin), want: login}}},
		{name: "bad key cleared by Running", steps: []step{{see: busError("invalid authkey"), want: "-"}, {see: bus(ipn.NeedsLogin), want: refusal, again: true},
			{see: poll(0, "Running"), want: connected}, {see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}}},
		{name: "an error while running means nothing", steps: []step{{see: poll(0, "Running"), want: connected}, {see: busError("x"), want: connected}, {see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}}},
		{name: "slow consumer", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busError("IPN bus consumer fell behind"), want: login}}},
		{name: "approval needed", steps: []step{{see: bus(ipn.NeedsMachineAuth), want: approval, again: true}, {after: time.Second, see: poll(0, "NeedsMachineAuth"), want: approval},
			{see: busEnd("EOF"), want: approval}, {see: bus(ipn.Starting), want: approval, again: true},
			{after: time.Second, see: poll(0, "Running"), want: connected}, {see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true}}},
		{name: "control unreachable at start", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busHealth(healthControl), want: unanswered},
			{see: busHealth(`{}`), want: login}}},
		{name: "control unreachable with state", steps: []step{{see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true}, {see: busHealth(healthControl), want: unanswered},
			{see: poll(0, "NoState"), want: unanswered}, {see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}, {after: time.Second, see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true}}},
		{name: "control unreachable at the second step of a login", steps: []step{{see: bus(ipn.NeedsLogin), want: login, again: true}, {see: busHealth(healthStep2), want: unanswered}}},
		{name: "control lost while running", steps: []step{{see: poll(0, "Running"), want: connected}, {see: pollSelf(ipnstate.PeerStatus{DNSName: "node-1.x.ts.net."}), want: connected + ", control lost"}}},
		{name: "a key that expires", steps: []step{
			{see: pollSelf(ipnstate.PeerStatus{DNSName: "node-1.x.ts.net.", Online: true, KeyExpiry: new(time.Date(2030, 6, 1, 0, 0, 0, 0, time.UTC))}), want: connected + ", until 2030"}}},
		{name: "daemon killed, and back", steps: []step{{see: poll(0, "Running"), want: connected}, {after: time.Second, see: busEnd("unexpected EOF"), want: "TailnetNotRunning: unexpected EOF"},
			{after: time.Second, see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true},
			{see: bus(ipn.Running), want: "-", again: true}, {after: time.Second, see: poll(0, "Running"), want: connected}}},
		{name: "bus ends and comes back to a running daemon", steps: []step{
			{see: poll(0, "Running"), want: connected}, {after: time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}, {after: time.Second, see: bus(ipn.Running), want: connected, again: true}}},
		{name: "down and up", steps: []step{{see: poll(0, "Running"), want: connected}, {see: bus(ipn.Stopped), want: stopped, again: true}, {after: time.Second, see: poll(0, "Stopped"), want: stopped},
			{see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true}, {see: bus(ipn.Running), want: "-", again: true},
			{after: time.Second, see: poll(0, "Running"), want: connected}}},
		{name: "stopped at start: only for a while", steps: []step{{see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true},
			{after: 3 * time.Second, see: poll(0, "Stopped"), want: "TailnetConnect: tailscaled is in state Stopped"},
			{after: 2*time.Second - 1, want: "TailnetConnect: tailscaled is in state Stopped"}, {after: 1, want: stopped}, {see: bus(ipn.Starting), want: "TailnetConnect: tailscaled is in state Starting", again: true},
			{after: time.Hour, see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}}},
		{name: "stopped, lost, and stopped again: the grace starts anew", steps: []step{
			{see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}, {after: 4 * time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"},
			{after: time.Second, see: bus(ipn.Stopped), want: "TailnetConnect: tailscaled is in state Stopped", again: true}, {after: 5 * time.Second, want: stopped}}},
		{name: "key expired by control", steps: []step{{see: poll(0, "Running"), want: connected}, {see: bus(ipn.NeedsLogin), want: expired, again: true}, {after: time.Second, see: poll(0, "NeedsLogin"), want: expired}}},
		{name: "state folder unusable", steps: []step{
			{see: bus(ipn.NoState), want: "TailnetConnect: tailscaled is in state NoState", again: true}, {see: busHealth(healthStore), want: "TailnetNotRunning: State store failed"},
			{after: time.Second, see: poll(0, "NoState"), want: "TailnetNotRunning: State store failed"}}},

		{name: "a poll overtaken by the bus says nothing", steps: []step{{see: poll(0, "Running"), want: connected}, {after: time.Second, see: bus(ipn.Stopped), want: stopped, again: true},
			{after: time.Millisecond, see: poll(2*time.Millisecond, "Running"), want: stopped, again: true}, {after: time.Millisecond, see: pollFails(3*time.Millisecond, "x"), want: stopped, again: true},
			{after: time.Millisecond, see: poll(time.Millisecond, "Running"), want: connected}}},
		{name: "a poll overtaken by the end of the bus", steps: []step{
			{after: time.Second, see: busEnd("EOF"), want: "TailnetNotRunning: EOF"}, {after: 1, see: poll(2, "Running"), want: "TailnetNotRunning: EOF", again: true}}},
		{name: "a rename on the bus asks for a poll", steps: []step{{see: poll(0, "Running"), want: connected}, {see: busJSON(`{"SelfChange":{"Name":"x"}}`), want: connected, again: true},
			{see: pollSelf(ipnstate.PeerStatus{DNSName: "other.x.ts.net.", Online: true}), want: "connected as other 100.1.2.3"}}},
		{name: "a state that is new to this client", steps: []step{{see: poll(0, "Hibernating"), want: "TailnetConnect: tailscaled is in state NoState"}}},
		{name: "running, but without itself", steps: []step{{see: polled(0, &ipnstate.Status{BackendState: "Running"}, nil), want: "-"}}},
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

// connectedState and lacks are states of the tailnet.
var connectedState = &tailnetState{hostname: "node-1", ip: "100.1.2.3"}

func lacks(kind *problemKind, detail string) *tailnetState {
	return &tailnetState{problem: &problem{kind, detail}}
}

// newTestTailnet returns a tailnet that nothing follows, and its log.
func newTestTailnet() (*tailnet, *logRecorder) {
	var log logRecorder
	return newTailnet(&config{socket: "/nowhere", hostname: "node-1"}, log.syncLogger()), &log
}

// TestConnect holds the retries to the clock: looks after 1, 2, 4, 8 and 16 s, an end at once when the
// connection comes, and the right name when it does not.
func TestConnect(t *testing.T) {
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
		{name: "at once", changes: []change{{0, connectedState}}},
		{name: "wakes up at once", changes: []change{{0, lacks(tailnetConnect, "x")}, {1234 * time.Millisecond, connectedState}}, retries: retries[:2], took: 1234 * time.Millisecond},
		{name: "in the last pause", changes: []change{{0, lacks(tailnetConnect, "x")}, {31*time.Second - 1, connectedState}}, retries: retries, took: 31*time.Second - 1},
		{name: "connected and lost again within a pause", changes: []change{{0, lacks(tailnetConnect, "x")}, {2 * time.Second, connectedState}, {2 * time.Second, lacks(tailnetConnect, "y")}},
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
		inBubble(t, row.name, func(t *testing.T) {
			tn, log := newTestTailnet()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			start := time.Now()
			go func() {
				for _, c := range row.changes {
					time.Sleep(c.at - time.Since(start))
					tn.publish(c.state)
				}
			}()
			if row.cancel > 0 {
				time.AfterFunc(row.cancel, cancel)
			}
			equal(t, "the error", errorText(tn.connect(ctx)), row.want)
			equal(t, "took", time.Since(start), row.took)
			var retries []time.Duration
			for i, line := range log.lines(t, "tailnet not connected yet, trying again") {
				retries = append(retries, line.time(t).Sub(start))
				line.expect(t, "retry", float64(i+1), "retry_in_secs", connectBackoff[i].Seconds())
			}
			equal(t, "retries", retries, row.retries)
		})
	}
}

// TestTell: a loss is told once, when it has lasted for a second, and its end with how long it was.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tn, log := newTestTailnet()
		lost := lacks(tailnetNotRunning, "first")
		see := func(s *tailnetState, want string) {
			t.Helper()
			tn.publish(s)
			var got []string
			for _, line := range log.lines(t) {
				got = append(got, fmt.Sprint(line["level"], " ", line["message"], " ", line["error"], " ", line["lost_for_ms"]))
			}
			log.buf.Reset()
			equal(t, "logged", strings.Join(got, "\n"), want)
		}
		see(lost, "") // at start that is connect's to tell
		time.Sleep(time.Minute)
		see(lost, "")
		see(connectedState, "")
		see(lost, "")
		time.Sleep(999 * time.Millisecond)
		see(connectedState, "INFO tailnet connected again <nil> 999")
		see(lost, "")
		time.Sleep(time.Second)
		see(lacks(tailnetAuth, "real"), "WARN tailnet connection lost; requests that still arrive are served TailnetAuth: real <nil>")
		time.Sleep(time.Hour)
		see(lost, "")
		see(connectedState, "INFO tailnet connected again <nil> 3.601e+06")
		see(lost, "")
		time.Sleep(time.Second)
		see(lost, "WARN tailnet connection lost; requests that still arrive are served TailnetNotRunning: first <nil>")
		see(connectedState, "INFO tailnet connected again <nil> 1000")
		see(&tailnetState{hostname: "node-1-1"}, "WARN this node has another name than tailscale.hostname says; clients reach it under its actual name <nil> <nil>")
		see(&tailnetState{hostname: "node-1-1"}, "")
		see(connectedState, "")
	})
}

// daemon is a scripted tailscaled behind a pipe. End-to-end tests run the real one; this one can be
// as slow as a test wants, to the nanosecond.
type daemon struct {
	mu     sync.Mutex
	status *ipnstate.Status
	hung   bool
	whois  http.HandlerFunc
	dials  []time.Time // of the bus
	bus    chan string // notices; closed to end the bus
}

// followed starts a tailnet that follows d, which runs unless it says something else.
func followed(t *testing.T, d *daemon) (*tailnet, *logRecorder) {
	t.Helper()
	d.bus, d.status = make(chan string), cmp.Or(d.status, daemonStatus("Running", "node-1."))
	listener := newPipeListener()
	server := &http.Server{Handler: d}
	go server.Serve(listener)
	tn, log := newTestTailnet()
	transport := &http.Transport{DialContext: listener.dial, MaxIdleConnsPerHost: maxLookups}
	tn.client.Transport = bounded{transport}
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { tn.follow(ctx) })
	t.Cleanup(func() {
		stop()
		wg.Wait()
		p := tn.current().problem
		holds(t, p == nil || !strings.Contains(p.detail, "canceled"), "its own end is taken for the daemon's: %v", p)
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
	status, _ := json.Marshal(d.status)
	if r.URL.Path == busPath {
		d.dials = append(d.dials, time.Now())
	}
	d.mu.Unlock()
	switch {
	case hung:
		<-r.Context().Done()
	case r.URL.Path == "/localapi/v0/status":
		w.Write(status)
	case r.URL.Path == busPath:
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
		d := &daemon{status: daemonStatus("NeedsLogin", "")}
		tn, log := followed(t, d)
		expect := func(what, want string) {
			t.Helper()
			synctest.Wait()
			now := tn.current()
			equal(t, what, verdict(&now), want)
		}
		expect("at start", "TailnetConnect: tailscaled is not logged in")
		d.bus <- `{"State":2}`
		d.bus <- `{"ErrMessage":"invalid authkey"}`
		expect("bad key", "TailnetAuth: invalid authkey")
		time.Sleep(time.Millisecond) // polls and notices of one instant can't be told apart
		d.set(func() { d.status = daemonStatus("Running", "node-1.x.") })
		d.bus <- fmt.Sprintf(`{"LoginFinished":{},"State":%d}`, ipn.Running)
		expect("the bus reports Running: polled at once", "connected as node-1 100.1.2.3")
		holds(t, tn.wasConnected(), "there was a connection")

		d.set(func() { d.hung = true })
		for range 3 { // two more than there is a poll for
			d.bus <- `{"SelfChange":{}}`
		}
		time.Sleep(pollTimeout + lossSettles + time.Second)
		expect("hung", "TailnetNotRunning: tailscaled does not answer on /nowhere")
		log.one(t, "tailnet connection lost; requests that still arrive are served")
		d.set(func() { d.hung = false })
		time.Sleep(pollTimeout + pollInterval) // less than the 20 s that are promised
		expect("recovered", "connected as node-1 100.1.2.3")
	})
}

// TestRedial: a bus that ends is dialled again every 100 ms until the first connection, then after pauses that
// grow to 500 ms.
func TestRedial(t *testing.T) {
	const ms = time.Millisecond
	for backend, pauses := range map[string][]time.Duration{
		"NeedsLogin": {100 * ms, 100 * ms, 100 * ms, 100 * ms},
		"Running":    {100 * ms, 200 * ms, 400 * ms, 500 * ms, 500 * ms},
	} {
		synctest.Test(t, func(t *testing.T) {
			d := &daemon{status: daemonStatus(backend, "node-1.")}
			followed(t, d)
			synctest.Wait()
			close(d.bus)
			at := time.Now()
			time.Sleep(3 * time.Second)
			d.mu.Lock()
			defer d.mu.Unlock()
			for i, pause := range pauses {
				at = at.Add(pause)
				equal(t, fmt.Sprint(backend, ": dial ", i+1), d.dials[i+1], at)
			}
		})
	}
}

// TestTailnetTalksTooMuch: what is larger than a real daemon's answers and messages is cut off, with the reason.
// A bus may say as much as it likes in messages of a usual size.
func TestTailnetTalksTooMuch(t *testing.T) {
	long := strings.Repeat("x", maxAnswer)
	for _, row := range []struct {
		name   string
		status *ipnstate.Status
		bus    []string
		want   string
	}{
		{name: "status", status: daemonStatus("Running", "node-1.", long), want: "TailnetNotRunning: " + errTooLarge.Error()},
		{name: "status of almost that size", status: daemonStatus("Running", "node-1.", long[:len(long)-1000]), want: "connected as node-1 100.1.2.3"},
		{name: "bus", bus: []string{`{"State":6}`, `{"ErrMessage":"` + long}, want: "TailnetNotRunning: " + errTooLarge.Error()},
		{name: "bus, in parts", bus: slices.Repeat([]string{`{"ErrMessage":"` + long[:len(long)/2] + `"}`}, 9), want: "connected as node-1 100.1.2.3"},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			d := &daemon{status: row.status}
			tn, _ := followed(t, d)
			synctest.Wait()
			time.Sleep(time.Millisecond) // polls and notices of one instant can't be told apart
			for _, text := range row.bus {
				d.bus <- text
			}
			synctest.Wait()
			now := tn.current()
			equal(t, "the state", verdict(&now), row.want)
		})
	}
}

// TestSocketPath: the kernel says no more than "invalid argument" of a path that is too long for a socket.
func TestSocketPath(t *testing.T) {
	for size, want := range map[int]string{
		107: "tailscaled's socket: dial unix PATH: connect: no such file or directory",
		108: "tailscaled's socket: its path has 108 bytes, more than the kernel's 107: choose a shorter one (TAILSCALE_SOCKET, tailscale.socket)",
	} {
		path := "/" + strings.Repeat("s", size-1)
		_, err := newTailnet(&config{socket: path, hostname: "x"}, slog.New(slog.DiscardHandler)).status(t.Context())
		equal(t, "the error", strings.ReplaceAll(errorText(err), path, "PATH"), want)
	}
}

// TestTailnetGauges: the gauges follow the state of the tailnet, and that there is none.
func TestTailnetGauges(t *testing.T) {
	expiry := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, row := range []struct {
		name  string
		state *tailnetState // nil: no tailnet
		want  string
	}{
		{name: "no tailnet", want: ""},
		{name: "not connected", state: &tailnetState{problem: &problem{tailnetConnect, ""}, online: true}, want: "connected 0, control_online 0"},
		{name: "connected", state: &tailnetState{hostname: "node-1", online: true}, want: "connected 1, control_online 1"},
		{name: "connected, control lost, key that expires", state: &tailnetState{hostname: "node-1", keyExpiry: expiry}, want: fmt.Sprint("connected 1, control_online 0, key_expiry_timestamp_seconds ", expiry.Unix())},
	} {
		var tn *tailnet
		if row.state != nil {
			tn, _ = newTestTailnet()
			tn.publish(row.state)
		}
		var got []string
		tailnetGauges(tn, func(name, help string, value func() (float64, bool)) {
			if v, ok := value(); ok {
				got = append(got, fmt.Sprint(strings.TrimPrefix(name, "tailnet_"), " ", int64(v)))
			}
		})
		equal(t, row.name, strings.Join(got, ", "), row.want)
	}
}

// whoisAlice is tailscaled's answer about a person's node.
const whoisAlice = `{"Node":{"Name":"laptop.x.ts.net."},"UserProfile":{"LoginName":"alice@example.com"}}`

// TestWhoIs: what tailscaled says of a caller, and how long that may take.
func TestWhoIs(t *testing.T) {
	for _, row := range []struct {
		name   string
		status int
		answer string
		delay  time.Duration
		leaves time.Duration // when the caller leaves, if ever
		want   identity
		err    string
		took   time.Duration
	}{
		{name: "person", answer: whoisAlice, want: alice},
		{name: "tagged node", answer: `{"Node":{"Name":"ci.x.ts.net.","Tags":["tag:ci","tag:prod"]},"UserProfile":{"LoginName":"tagged-devices"}}`, want: identity{node: "ci.x.ts.net", user: "tag:ci,tag:prod"}},
		{name: "granted", answer: strings.Replace(whoisAlice, "{", `{"CapMap":{"a.b/c":null,"example.com/cap/claude":[{"x":1}]},`, 1), want: granted},
		{name: "granted another", answer: strings.Replace(whoisAlice, "{", `{"CapMap":{"example.com/cap/claude2":null},`, 1), want: alice},
		{name: "no profile", answer: `{"Node":{"Name":"x."}}`, want: identity{node: "x"}},
		{name: "no node", answer: `{"UserProfile":{"LoginName":"a@b"}}`, want: identity{user: "a@b"}},
		{name: "nothing", answer: `{}`},
		{name: "null", answer: `null`},
		{name: "unknown", status: 404, answer: "no match for IP:port"},
		{name: "slow", answer: whoisAlice, delay: lookupTimeout - 1, took: lookupTimeout - 1, want: alice},
		{name: "hung", answer: whoisAlice, delay: time.Hour, took: lookupTimeout, err: "tailscaled does not answer on /nowhere"},
		{name: "caller leaves", answer: whoisAlice, delay: time.Hour, leaves: time.Second, took: time.Second, err: "gone"},
		{name: "failure", status: 500, answer: "oh", err: "500 Internal Server Error: oh"},
		{name: "too much", answer: `{"Node":{"Name":"` + strings.Repeat("x", maxAnswer), err: errTooLarge.Error()},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			tn, _ := followed(t, &daemon{whois: func(w http.ResponseWriter, r *http.Request) {
				equal(t, "asked about", r.FormValue("addr"), "100.9.8.7:1234")
				select {
				case <-time.After(row.delay):
				case <-r.Context().Done():
				}
				w.WriteHeader(max(200, row.status))
				io.WriteString(w, row.answer)
			}})
			tn.required = "example.com/cap/claude"
			ctx, leave := context.WithCancelCause(t.Context())
			defer leave(nil)
			if row.leaves > 0 {
				time.AfterFunc(row.leaves, func() { leave(errors.New("gone")) })
			}
			start := time.Now()
			who, err := tn.whoIs(ctx, "100.9.8.7:1234")
			equal(t, "who", who, row.want)
			equal(t, "the error", errorText(err), row.err)
			equal(t, "took", time.Since(start), row.took)
		})
	}
}

// TestLookupsAreLimited: tailscaled is asked about 16 callers at once at most. The others wait for their turn, and
// no longer in all than for a lookup: here two rounds have the time for it, and the third has not.
func TestLookupsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most, answered atomic.Int32
		tn, _ := followed(t, &daemon{whois: func(w http.ResponseWriter, _ *http.Request) {
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			time.Sleep(4 * time.Second)
			now.Add(-1)
			io.WriteString(w, whoisAlice)
		}})
		start := time.Now()
		together(3*maxLookups, func(int) {
			if who, err := tn.whoIs(t.Context(), "100.9.8.7:1234"); err == nil && who.node != "" {
				answered.Add(1)
			}
		})
		equal(t, "at once", most.Load(), maxLookups)
		equal(t, "answered", answered.Load(), 2*maxLookups)
		equal(t, "took", time.Since(start), lookupTimeout)
	})
}
