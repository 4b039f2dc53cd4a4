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

// seen is what happens next: an event, some time after the last one.
type seen struct {
	wait  time.Duration
	event func(now time.Time) event // nil: only time passes
}

func wait(d time.Duration) seen { return seen{wait: d} }

func happens(e event) seen { return seen{event: func(time.Time) event { return e }} }

func (s seen) after(d time.Duration) seen { return seen{d, s.event} }

// busJSON is a notice as it comes over the wire: bus of a state, busError of control's refusal of a login, busHealth a health report.
func busJSON(format string, values ...any) seen {
	var n notice
	if err := json.Unmarshal(fmt.Appendf(nil, format, values...), &n); err != nil {
		panic(err)
	}
	return happens(event{notice: &n})
}

func bus(s ipn.State) seen           { return busJSON(`{"State":%d}`, s) }
func busError(message string) seen   { return busJSON(`{"ErrMessage":%q}`, message) }
func busHealth(warnings string) seen { return busJSON(`{"Health":{"Warnings":%s}}`, warnings) }
func busEnd(text string) seen        { return happens(event{err: errors.New(text)}) }

// polled is the answer to a poll that was begun age before: poll that of a daemon in the given state, pollSelf of a running one that says
// self of itself, pollFails a failure.
func polled(age time.Duration, status *ipnstate.Status, err error) seen {
	return seen{event: func(now time.Time) event { return event{status: status, err: err, asked: now.Add(-age)} }}
}

func poll(age time.Duration, backend string) seen {
	return polled(age, daemonStatus(backend, "node-1.x.ts.net."), nil)
}

func pollSelf(self ipnstate.PeerStatus) seen {
	return polled(0, &ipnstate.Status{BackendState: "Running", TailscaleIPs: daemonStatus("", "").TailscaleIPs, Self: &self}, nil)
}

func pollFails(age time.Duration, text string) seen { return polled(age, nil, errors.New(text)) }

// daemonStatus is what tailscaled says of itself.
func daemonStatus(backend, dnsName string, health ...string) *ipnstate.Status {
	return &ipnstate.Status{BackendState: backend, Health: health, TailscaleIPs: []netip.Addr{netip.MustParseAddr("100.1.2.3"), netip.MustParseAddr("fd7a::1")},
		Self: &ipnstate.PeerStatus{DNSName: dnsName, HostName: "node", Online: true}}
}

var running = daemonStatus("Running", "node-1.")

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
// step says what is seen, what is concluded, and whether another poll is wanted.
func TestView(t *testing.T) {
	const (
		connected  = "connected as node-1 100.1.2.3"
		login      = "TailnetConnect: tailscaled is not logged in"
		inState    = "TailnetConnect: tailscaled is in state "
		unanswered = "TailnetConnect: You are logged out: no answer"
		notRunning = "TailnetNotRunning: "
		stopped    = "TailnetNotRunning: tailscaled is stopped (tailscale down): run tailscale up"
		expired    = "TailnetAuth: the node's key has expired, or it was logged out"
		approval   = "TailnetMachineAuth: the node awaits approval"
		refusal    = "TailnetAuth: invalid authkey"
		again      = " (poll again)"
	)
	type step struct {
		see  seen
		want string
	}
	inBubbles(t, map[string][]step{
		"nothing yet": {{wait(0), "-"}},
		"socket absent": {{busEnd("connect: no such file or directory"), notRunning + "connect: no such file or directory"},
			{pollFails(time.Millisecond, "x"), notRunning + "connect: no such file or directory" + again},
			{pollFails(time.Millisecond, "still absent").after(time.Second), notRunning + "still absent"}},
		"normal login": {{bus(ipn.NoState), inState + "NoState" + again}, {bus(ipn.NeedsLogin), login + again}, {poll(0, "NeedsLogin"), login},
			{busJSON(`{"LoginFinished":{}}`), login}, {bus(ipn.Starting), inState + "Starting" + again}, {bus(ipn.Running), "-" + again},
			{poll(0, "Running").after(time.Millisecond), connected}},
		"known by polls alone": {{poll(0, "Starting"), inState + "Starting"}, {poll(0, "Running"), connected}},
		"bad key": {{bus(ipn.NeedsLogin), login + again}, {busError("invalid authkey"), refusal}, {poll(0, "NeedsLogin").after(time.Second), refusal},
			{busError("invalid authkey"), refusal}, {busEnd("EOF"), refusal}, {pollFails(0, "ENOENT").after(time.Minute), refusal}}, // the daemon exits over it
		"bad key, seen by the health report alone": {{bus(ipn.NeedsLogin), login + again}, {busHealth(healthKey), "TailnetAuth: You are logged out: invalid authkey"},
			{poll(0, "NeedsLogin"), "TailnetAuth: You are logged out: invalid authkey"}, {busHealth(healthLogin), login}},
		"bad key cleared by Running": {{busError("invalid authkey"), "-"}, {bus(ipn.NeedsLogin), refusal + again}, {poll(0, "Running"), connected},
			{busEnd("EOF"), notRunning + "EOF"}},
		"an error while running means nothing": {{poll(0, "Running"), connected}, {busError("x"), connected}, {busEnd("EOF"), notRunning + "EOF"}},
		"slow consumer":                        {{bus(ipn.NeedsLogin), login + again}, {busError("IPN bus consumer fell behind"), login}},
		"approval needed": {{bus(ipn.NeedsMachineAuth), approval + again}, {poll(0, "NeedsMachineAuth").after(time.Second), approval}, {busEnd("EOF"), approval},
			{bus(ipn.Starting), approval + again}, {poll(0, "Running").after(time.Second), connected}, {bus(ipn.Starting), inState + "Starting" + again}},
		"control unreachable at start": {{bus(ipn.NeedsLogin), login + again}, {busHealth(healthControl), unanswered}, {busHealth(`{}`), login}},
		"control unreachable with state": {{bus(ipn.NoState), inState + "NoState" + again}, {busHealth(healthControl), unanswered}, {poll(0, "NoState"), unanswered},
			{busEnd("EOF"), notRunning + "EOF"}, {bus(ipn.NoState).after(time.Second), inState + "NoState" + again}},
		"control unreachable at the second step of a login": {{bus(ipn.NeedsLogin), login + again}, {busHealth(healthStep2), unanswered}},
		"control lost while running":                        {{poll(0, "Running"), connected}, {pollSelf(ipnstate.PeerStatus{DNSName: "node-1.x.ts.net."}), connected + ", control lost"}},
		"a key that expires":                                {{pollSelf(ipnstate.PeerStatus{DNSName: "node-1.x.ts.net.", Online: true, KeyExpiry: new(time.Date(2030, 6, 1, 0, 0, 0, 0, time.UTC))}), connected + ", until 2030"}},
		"daemon killed, and back": {{poll(0, "Running"), connected}, {busEnd("unexpected EOF").after(time.Second), notRunning + "unexpected EOF"},
			{bus(ipn.NoState).after(time.Second), inState + "NoState" + again}, {bus(ipn.Running), "-" + again}, {poll(0, "Running").after(time.Second), connected}},
		"bus ends and comes back to a running daemon": {{poll(0, "Running"), connected}, {busEnd("EOF").after(time.Second), notRunning + "EOF"},
			{bus(ipn.Running).after(time.Second), connected + again}},
		"down and up": {{poll(0, "Running"), connected}, {bus(ipn.Stopped), stopped + again}, {poll(0, "Stopped").after(time.Second), stopped},
			{bus(ipn.Starting), inState + "Starting" + again}, {bus(ipn.Running), "-" + again}, {poll(0, "Running").after(time.Second), connected}},
		"stopped at start: only for a while": {{bus(ipn.Stopped), inState + "Stopped" + again}, {poll(0, "Stopped").after(3 * time.Second), inState + "Stopped"},
			{wait(2*time.Second - 1), inState + "Stopped"}, {wait(1), stopped}, {bus(ipn.Starting), inState + "Starting" + again},
			{bus(ipn.Stopped).after(time.Hour), inState + "Stopped" + again}},
		"stopped, lost, and stopped again: the grace starts anew": {{bus(ipn.Stopped), inState + "Stopped" + again},
			{busEnd("EOF").after(4 * time.Second), notRunning + "EOF"}, {bus(ipn.Stopped).after(time.Second), inState + "Stopped" + again}, {wait(5 * time.Second), stopped}},
		"key expired by control": {{poll(0, "Running"), connected}, {bus(ipn.NeedsLogin), expired + again}, {poll(0, "NeedsLogin").after(time.Second), expired}},
		"state folder unusable": {{bus(ipn.NoState), inState + "NoState" + again}, {busHealth(healthStore), notRunning + "State store failed"},
			{poll(0, "NoState").after(time.Second), notRunning + "State store failed"}},
		"a poll overtaken by the bus says nothing": {{poll(0, "Running"), connected}, {bus(ipn.Stopped).after(time.Second), stopped + again},
			{poll(2*time.Millisecond, "Running").after(time.Millisecond), stopped + again}, {pollFails(3*time.Millisecond, "x").after(time.Millisecond), stopped + again},
			{poll(time.Millisecond, "Running").after(time.Millisecond), connected}},
		"a poll overtaken by the end of the bus": {{busEnd("EOF").after(time.Second), notRunning + "EOF"}, {poll(2, "Running").after(1), notRunning + "EOF" + again}},
		"a rename on the bus asks for a poll": {{poll(0, "Running"), connected}, {busJSON(`{"SelfChange":{"Name":"x"}}`), connected + again},
			{pollSelf(ipnstate.PeerStatus{DNSName: "other.x.ts.net.", Online: true}), "connected as other 100.1.2.3"}},
		"a state that is new to this client": {{poll(0, "Hibernating"), inState + "NoState"}},
		"running, but without itself":        {{polled(0, &ipnstate.Status{BackendState: "Running"}, nil), "-"}},
		"a notice of nothing that matters":   {{busJSON(`{"Version":"1","NetMap":{"x":1},"Prefs":null}`), "-"}},
	}, func(t *testing.T, steps []step) {
		v, now := &view{}, time.Now()
		for i, step := range steps {
			now = now.Add(step.see.wait)
			polls := step.see.event != nil && v.take(step.see.event(now), now)
			got := verdict(v.state(now))
			if polls {
				got += again
			}
			equal(t, fmt.Sprint("step ", i), got, step.want)
		}
	})
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
	type row struct {
		changes []change
		cancel  time.Duration
		retries []time.Duration
		took    time.Duration
		want    string // the error
	}
	inBubbles(t, map[string]row{
		"at once":           {changes: []change{{0, connectedState}}},
		"wakes up at once":  {changes: []change{{0, lacks(tailnetConnect, "x")}, {1234 * time.Millisecond, connectedState}}, retries: retries[:2], took: 1234 * time.Millisecond},
		"in the last pause": {changes: []change{{0, lacks(tailnetConnect, "x")}, {31*time.Second - 1, connectedState}}, retries: retries, took: 31*time.Second - 1},
		"connected and lost again within a pause": {changes: []change{{0, lacks(tailnetConnect, "x")}, {2 * time.Second, connectedState}, {2 * time.Second, lacks(tailnetConnect, "y")}},
			retries: retries[:2], took: 2 * time.Second},
		"gives up":                            {changes: []change{{0, lacks(tailnetConnect, "x")}}, retries: retries, took: 31 * time.Second, want: "TailnetConnect: x"},
		"gives up with the last cause":        {changes: []change{{0, lacks(tailnetConnect, "x")}, {30 * time.Second, lacks(tailnetMachineAuth, "y")}}, retries: retries, took: 31 * time.Second, want: "TailnetMachineAuth: y"},
		"a login that never came lacks a key": {changes: []change{{0, lacks(tailnetConnect, awaitingLogin)}}, retries: retries, took: 31 * time.Second, want: "TailnetAuth: " + awaitingLogin},
		"bad key is not given up early":       {changes: []change{{0, lacks(tailnetAuth, "invalid authkey")}}, retries: retries, took: 31 * time.Second, want: "TailnetAuth: invalid authkey"},
		"nothing is ever seen": {retries: []time.Duration{3 * time.Second, 4 * time.Second, 6 * time.Second, 10 * time.Second, 18 * time.Second}, took: 34 * time.Second,
			want: "TailnetNotRunning: tailscaled has not answered yet on /nowhere"},
		"told to stop before anything is seen": {cancel: time.Second, took: time.Second, want: "context canceled"},
		"told to stop in a pause":              {changes: []change{{0, lacks(tailnetConnect, "x")}}, cancel: 5 * time.Second, retries: retries[:3], took: 5 * time.Second, want: "context canceled"},
	}, func(t *testing.T, row row) {
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
			retries = append(retries, line.time().Sub(start))
			line.expect(t, "retry", float64(i+1), "retry_in_secs", connectBackoff[i].Seconds())
		}
		equal(t, "retries", retries, row.retries)
	})
}

// TestTell: a loss is told once, when it has lasted for a second, and its end with how long it was.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tn, log := newTestTailnet()
		lost, renamed := lacks(tailnetNotRunning, "first"), &tailnetState{hostname: "node-1-1"}
		for i, step := range []struct {
			after time.Duration
			state *tailnetState
			want  string
		}{
			{0, lost, ""}, // at start that is connect's to tell
			{time.Minute, lost, ""}, {0, connectedState, ""}, {0, lost, ""},
			{999 * time.Millisecond, connectedState, "INFO tailnet connected again <nil> 999"}, {0, lost, ""},
			{time.Second, lacks(tailnetAuth, "real"), "WARN tailnet connection lost; requests that still arrive are served TailnetAuth: real <nil>"},
			{time.Hour, lost, ""}, {0, connectedState, "INFO tailnet connected again <nil> 3.601e+06"}, {0, lost, ""},
			{time.Second, lost, "WARN tailnet connection lost; requests that still arrive are served TailnetNotRunning: first <nil>"},
			{0, connectedState, "INFO tailnet connected again <nil> 1000"},
			{0, renamed, "WARN this node has another name than tailscale.hostname says; clients reach it under its actual name <nil> <nil>"},
			{0, renamed, ""}, {0, connectedState, ""},
		} {
			time.Sleep(step.after)
			tn.publish(step.state)
			var got []string
			for _, line := range log.lines(t) {
				got = append(got, fmt.Sprint(line["level"], " ", line["message"], " ", line["error"], " ", line["lost_for_ms"]))
			}
			log.buf.Reset()
			equal(t, fmt.Sprint("logged at step ", i), strings.Join(got, "\n"), step.want)
		}
	})
}

// daemon is a scripted tailscaled behind a pipe. End-to-end tests run the real one; this one can be
// as slow as a test wants, to the nanosecond.
type daemon struct {
	status atomic.Pointer[ipnstate.Status] // nil: it hangs
	whois  http.HandlerFunc
	dials  chan time.Time // of the bus
	bus    chan string    // notices; closed to end the bus
	log    *logRecorder   // of the tailnet that follows it
}

// followed starts a tailnet that follows a daemon.
func followed(t *testing.T, status *ipnstate.Status, whois http.HandlerFunc) (*tailnet, *daemon) {
	t.Helper()
	tn, log := newTestTailnet()
	d := &daemon{whois: whois, dials: make(chan time.Time, 100), bus: make(chan string), log: log}
	d.status.Store(status)
	listener := newPipeListener()
	server := &http.Server{Handler: d}
	go server.Serve(listener)
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
	return tn, d
}

// ServeHTTP implements http.Handler.
func (d *daemon) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status := d.status.Load()
	switch {
	case status == nil:
		<-r.Context().Done()
	case r.URL.Path == "/localapi/v0/status":
		json.NewEncoder(w).Encode(status)
	case r.URL.Path == "/localapi/v0/whois":
		d.whois(w, r)
	case r.URL.Path == busPath:
		d.dials <- time.Now()
		http.NewResponseController(w).Flush()
		for {
			select {
			case text, ok := <-d.bus:
				if !ok {
					return
				}
				io.WriteString(w, text+"\n")
				http.NewResponseController(w).Flush()
			case <-r.Context().Done():
				return
			}
		}
	}
}

// TestFollow follows a daemon through its life.
func TestFollow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tn, d := followed(t, daemonStatus("NeedsLogin", ""), nil)
		expect := func(what, want string) {
			t.Helper()
			synctest.Wait()
			equal(t, what, verdict(new(tn.current())), want)
		}
		expect("at start", "TailnetConnect: tailscaled is not logged in")
		d.bus <- `{"State":2}`
		d.bus <- `{"ErrMessage":"invalid authkey"}`
		expect("bad key", "TailnetAuth: invalid authkey")
		time.Sleep(time.Millisecond) // polls and notices of one instant can't be told apart
		d.status.Store(daemonStatus("Running", "node-1.x."))
		d.bus <- fmt.Sprintf(`{"LoginFinished":{},"State":%d}`, ipn.Running)
		expect("the bus reports Running: polled at once", "connected as node-1 100.1.2.3")
		holds(t, tn.wasConnected(), "there was a connection")

		d.status.Store(nil)
		for range 3 { // two more than there is a poll for
			d.bus <- `{"SelfChange":{}}`
		}
		time.Sleep(pollTimeout + lossGrace + time.Second)
		expect("hung", "TailnetNotRunning: tailscaled does not answer on /nowhere")
		d.log.one(t, "tailnet connection lost; requests that still arrive are served")
		d.status.Store(daemonStatus("Running", "node-1.x."))
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
			_, d := followed(t, daemonStatus(backend, "node-1."), nil)
			synctest.Wait()
			close(d.bus)
			at := <-d.dials
			time.Sleep(3 * time.Second)
			for i, pause := range pauses {
				at = at.Add(pause)
				equal(t, fmt.Sprint(backend, ": dial ", i+1), <-d.dials, at)
			}
		})
	}
}

// TestTailnetTalksTooMuch: what is larger than a real daemon's answers and messages is cut off, with the reason.
// A bus may say as much as it likes in messages of a usual size.
func TestTailnetTalksTooMuch(t *testing.T) {
	long := strings.Repeat("x", maxAnswer)
	type row struct {
		status *ipnstate.Status
		bus    []string
		want   string
	}
	inBubbles(t, map[string]row{
		"status":                     {status: daemonStatus("Running", "node-1.", long), want: "TailnetNotRunning: " + errTooLarge.Error()},
		"status of almost that size": {status: daemonStatus("Running", "node-1.", long[:len(long)-1000]), want: "connected as node-1 100.1.2.3"},
		"bus":                        {bus: []string{`{"State":6}`, `{"ErrMessage":"` + long}, want: "TailnetNotRunning: " + errTooLarge.Error()},
		"bus, in parts":              {bus: slices.Repeat([]string{`{"ErrMessage":"` + long[:len(long)/2] + `"}`}, 9), want: "connected as node-1 100.1.2.3"},
	}, func(t *testing.T, row row) {
		tn, d := followed(t, cmp.Or(row.status, running), nil)
		for _, text := range row.bus {
			synctest.Wait()
			time.Sleep(time.Millisecond) // polls and notices of one instant can't be told apart, and a notice may ask for a poll
			d.bus <- text
		}
		synctest.Wait()
		equal(t, "the state", verdict(new(tn.current())), row.want)
	})
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
	for name, row := range map[string]struct {
		state *tailnetState // nil: no tailnet
		want  string
	}{
		"no tailnet":    {want: ""},
		"not connected": {state: &tailnetState{problem: &problem{tailnetConnect, ""}, online: true}, want: "connected 0, control_online 0"},
		"connected":     {state: &tailnetState{hostname: "node-1", online: true}, want: "connected 1, control_online 1"},
		"connected, control lost, key that expires": {state: &tailnetState{hostname: "node-1", keyExpiry: expiry}, want: fmt.Sprint("connected 1, control_online 0, key_expiry_timestamp_seconds ", expiry.Unix())},
	} {
		var tn *tailnet
		if row.state != nil {
			tn, _ = newTestTailnet()
			tn.publish(row.state)
		}
		var got []string
		tailnetGauges(tn, func(metric, help string, value func() (float64, bool)) {
			if v, ok := value(); ok {
				got = append(got, fmt.Sprint(strings.TrimPrefix(metric, "tailnet_"), " ", int64(v)))
			}
		})
		equal(t, name, strings.Join(got, ", "), row.want)
	}
}

// whoisAlice is tailscaled's answer about a person's node.
const whoisAlice = `{"Node":{"Name":"laptop.x.ts.net."},"UserProfile":{"LoginName":"alice@example.com"}}`

// TestWhoIs: what tailscaled says of a caller, and how long that may take.
func TestWhoIs(t *testing.T) {
	type row struct {
		status int
		answer string
		delay  time.Duration
		leaves time.Duration // when the caller leaves, if ever
		want   identity
		err    string
		took   time.Duration
	}
	inBubbles(t, map[string]row{
		"person":          {answer: whoisAlice, want: alice},
		"tagged node":     {answer: `{"Node":{"Name":"ci.x.ts.net.","Tags":["tag:ci","tag:prod"]},"UserProfile":{"LoginName":"tagged-devices"}}`, want: identity{node: "ci.x.ts.net", user: "tag:ci,tag:prod"}},
		"granted":         {answer: strings.Replace(whoisAlice, "{", `{"CapMap":{"a.b/c":null,"example.com/cap/claude":[{"x":1}]},`, 1), want: granted},
		"granted another": {answer: strings.Replace(whoisAlice, "{", `{"CapMap":{"example.com/cap/claude2":null},`, 1), want: alice},
		"no profile":      {answer: `{"Node":{"Name":"x."}}`, want: identity{node: "x"}},
		"no node":         {answer: `{"UserProfile":{"LoginName":"a@b"}}`, want: identity{user: "a@b"}},
		"nothing":         {answer: `{}`},
		"null":            {answer: `null`},
		"unknown":         {status: 404, answer: "no match for IP:port"},
		"slow":            {answer: whoisAlice, delay: lookupTimeout - 1, took: lookupTimeout - 1, want: alice},
		"hung":            {answer: whoisAlice, delay: time.Hour, took: lookupTimeout, err: "tailscaled does not answer on /nowhere"},
		"caller leaves":   {answer: whoisAlice, delay: time.Hour, leaves: time.Second, took: time.Second, err: "gone"},
		"failure":         {status: 500, answer: "oh", err: "500 Internal Server Error: oh"},
		"too much":        {answer: `{"Node":{"Name":"` + strings.Repeat("x", maxAnswer), err: errTooLarge.Error()},
	}, func(t *testing.T, row row) {
		tn, _ := followed(t, running, func(w http.ResponseWriter, r *http.Request) {
			equal(t, "asked about", r.FormValue("addr"), "100.9.8.7:1234")
			select {
			case <-time.After(row.delay):
			case <-r.Context().Done():
			}
			w.WriteHeader(max(200, row.status))
			io.WriteString(w, row.answer)
		})
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

// TestLookupsAreLimited: tailscaled is asked about 16 callers at once at most. The others wait for their turn, and
// no longer in all than for a lookup: here two rounds have the time for it, and the third has not.
func TestLookupsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most, answered atomic.Int32
		tn, _ := followed(t, running, func(w http.ResponseWriter, _ *http.Request) {
			n := now.Add(1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			time.Sleep(4 * time.Second)
			now.Add(-1)
			io.WriteString(w, whoisAlice)
		})
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
