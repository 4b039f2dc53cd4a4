package main

//lint:file-ignore SA1019 The package tailscale.com/client/tailscale is deprecated in favour of client/local, of which
// it is an alias; the project's users chose the older name.

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/client/tailscale"
	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

const (
	// pollInterval is how often tailscaled is asked for its status. The bus reports changes at once;
	// the poll finds hangs, and what the bus does not tell: Online, key expiry, renames.
	pollInterval = 10 * time.Second
	// pollTimeout is when a tailscaled that does not answer counts as hung.
	pollTimeout = 3 * time.Second
	// stoppedGrace is how long a daemon may be stopped, at start, before that is a cause of its
	// own: a start can pass through it.
	stoppedGrace = 5 * time.Second
	// lossSettles is how long a loss must last to be logged.
	lossSettles = time.Second
	// Pauses between attempts to watch the bus. They grow only once there has been a connection: a
	// daemon that is started with a bad key lives for some 300 ms, and says so only on its bus.
	minRedial, maxRedial = 100 * time.Millisecond, 500 * time.Millisecond
)

// connectBackoff are the pauses between the looks at a tailnet that is not connected at start.
var connectBackoff = []time.Duration{1 * time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second}

// errPeerNotFound is tailscaled's answer about callers that are not on the tailnet.
var errPeerNotFound = tailscale.ErrPeerNotFound

// problem says why the tailnet is not connected: one of the four names that operators know.
type problem struct {
	kind   *problemKind
	detail string // tailscaled's words
}

// problemKind is a class of problems, with the words for operators.
type problemKind struct{ name, message, hint string }

var (
	tailnetAuth = &problemKind{"TailnetAuth", "Tailnet authentication failed",
		"the auth key is missing, invalid or expired: make a new one in the Tailscale admin console, replace the secret tailscale-authkey and restart the pod"}
	tailnetMachineAuth = &problemKind{"TailnetMachineAuth", "Tailnet needs machine authorization",
		"approve this node in the Tailscale admin console (Machines)"}
	tailnetNotRunning = &problemKind{"TailnetNotRunning", "Tailnet daemon not running",
		"see the log of the tailscaled container, and that it shares the socket's volume with this one (TAILSCALE_SOCKET, tailscale.socket)"}
	tailnetConnect = &problemKind{"TailnetConnect", "Tailnet connection failed",
		"check that tailscaled reaches its coordination server"}
)

// Error implements error.
func (p *problem) Error() string { return p.kind.name + ": " + p.detail }

// tailnetState is what is known of the tailnet at one moment.
type tailnetState struct {
	problem   *problem // nil while connected
	hostname  string   // this node's name in the tailnet, without the domain
	ip        string   // its first address
	online    bool     // tailscaled reaches its coordination server; connections live on without
	keyExpiry time.Time
}

// tailnet follows tailscaled: it watches its bus, polls its status, and identifies callers.
type tailnet struct {
	client   *tailscale.LocalClient
	socket   string
	expected string // hostname
	log      *slog.Logger

	lost      time.Time // when the connection was lost, zero while there is one; used by follow alone
	told      bool      // that is in the log
	state     atomic.Pointer[tailnetState]
	connected chan struct{} // closed at the first connection
	everOnce  sync.Once
	looked    chan struct{} // closed once tailscaled, or its absence, was seen
	lookOnce  sync.Once
	lookups   chan struct{} // limits concurrent WhoIs calls
}

// newTailnet returns a tailnet that talks to tailscaled on the given Unix socket once followed.
func newTailnet(socket, expectedHostname string, log *slog.Logger) *tailnet {
	t := &tailnet{
		// A transport of our own: the client's retries a missing socket for two seconds, and runs
		// systemctl to explain it.
		client: &tailscale.LocalClient{OmitAuth: true, Transport: &http.Transport{
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				var d net.Dialer
				conn, err := d.DialContext(ctx, "unix", socket)
				if err != nil {
					return nil, fmt.Errorf("tailscaled's socket: %w", err)
				}
				return conn, nil
			},
			MaxIdleConnsPerHost: maxLookups,
			IdleConnTimeout:     time.Minute,
		}},
		socket:    socket,
		expected:  expectedHostname,
		log:       log,
		connected: make(chan struct{}),
		looked:    make(chan struct{}),
		lookups:   make(chan struct{}, maxLookups),
	}
	t.state.Store(&tailnetState{problem: &problem{tailnetNotRunning, "tailscaled has not answered yet on " + socket}})
	return t
}

// current returns the newest state.
func (t *tailnet) current() tailnetState { return *t.state.Load() }

// wasConnected reports whether there has ever been a connection.
func (t *tailnet) wasConnected() bool {
	select {
	case <-t.connected:
		return true
	default:
		return false
	}
}

// connect waits for the first connection. It looks, and looks again after each pause of
// connectBackoff; a connection that comes meanwhile ends the wait at once. Its error is a *problem
// that names the cause, or ctx's.
func (t *tailnet) connect(ctx context.Context) error {
	wait := time.NewTimer(pollTimeout)
	defer wait.Stop()
	select {
	case <-t.looked: // at the first look, something must have been seen to speak of
	case <-wait.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	for retry := 0; ; retry++ {
		if t.wasConnected() {
			return nil
		}
		cause := t.current().problem
		if cause == nil {
			return nil
		}
		if retry == len(connectBackoff) {
			return lastWord(cause)
		}
		pause := connectBackoff[retry]
		t.log.Warn("Tailnet not connected yet, trying again", "error", cause.Error(), "retry", retry+1, "retry_in_secs", int(pause/time.Second))
		wait.Reset(pause)
		select {
		case <-t.connected:
			return nil
		case <-wait.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lastWord names the cause of a start that failed. A login that is still awaited after all that
// time, with no trouble reaching the coordination server, lacks a usable key.
func lastWord(cause *problem) *problem {
	if cause.detail == awaitingLogin {
		return &problem{tailnetAuth, awaitingLogin}
	}
	return cause
}

// awaitingLogin is the detail of a login that nothing is known to hold up.
const awaitingLogin = "tailscaled is not logged in"

// follow keeps the state up to date until ctx ends.
func (t *tailnet) follow(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	events := make(chan event)
	wg.Go(func() { t.watchBus(ctx, events) })
	poll := make(chan struct{}, 1)
	wg.Go(func() { t.pollStatus(ctx, poll, events) })

	v := &view{}
	tick := time.NewTicker(time.Second) // for what only time changes
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case e := <-events:
			if again := v.take(e, time.Now()); again {
				select {
				case poll <- struct{}{}:
				default: // one is due anyway
				}
			}
		}
		if s := v.state(time.Now()); s != nil {
			t.publish(s)
			t.tell(s, time.Now())
		}
	}
}

// publish makes s the current state.
func (t *tailnet) publish(s *tailnetState) {
	if s.problem == nil && s.hostname != t.current().hostname && s.hostname != t.expected {
		t.log.Warn("this node has another name than tailscale.hostname says; clients reach it under its actual name",
			"tailnet_hostname", s.hostname, "expected", t.expected)
	}
	t.state.Store(s)
	if s.problem == nil {
		t.everOnce.Do(func() { close(t.connected) })
	}
	t.lookOnce.Do(func() { close(t.looked) })
}

// tell logs that the connection was lost, and that it is back. The loss is told once, when it has
// lasted for lossSettles: on the way to its real cause a daemon passes through other states.
func (t *tailnet) tell(s *tailnetState, now time.Time) {
	switch {
	case !t.wasConnected():
	case s.problem == nil && !t.lost.IsZero():
		t.log.Info("tailnet connected again", "tailnet_hostname", s.hostname, "tailnet_ip", s.ip, "lost_for_ms", now.Sub(t.lost).Milliseconds())
		t.lost, t.told = time.Time{}, false
	case s.problem != nil && t.lost.IsZero():
		t.lost = now
	case s.problem != nil && !t.told && now.Sub(t.lost) >= lossSettles:
		t.told = true
		t.log.Warn("tailnet connection lost; requests that still arrive are served", "error", s.problem.Error(), "hint", s.problem.kind.hint)
	}
}

// event is one thing seen of tailscaled: a notice on its bus, an answer to a poll, or the failure
// to get either.
type event struct {
	notice *notice
	status *ipnstate.Status
	err    error
	asked  time.Time // when the poll that status or err answers was begun; zero for the bus
}

// watchBus sends what tailscaled says on its bus, for as long as ctx lasts.
func (t *tailnet) watchBus(ctx context.Context, events chan<- event) {
	pause := minRedial
	for ctx.Err() == nil {
		err := t.watchBusOnce(ctx, events, func() { pause = minRedial })
		send(ctx, events, event{err: err})
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
		if t.wasConnected() {
			pause = min(2*pause, maxRedial)
		}
	}
}

// watchBusOnce watches the bus until it ends, and returns why it did. It calls alive at each notice.
//
// It is LocalClient.WatchIPNBus with a smaller [notice]: decoding all of ipn.Notify would link 94 KB
// of types, and break with any daemon that changes one of them.
func (t *tailnet) watchBusOnce(ctx context.Context, events chan<- event, alive func()) error {
	// More bits are refused by some daemons, or mean other things to them.
	const mask = ipn.NotifyInitialState | ipn.NotifyInitialHealthState | ipn.NotifyNoPrivateKeys
	address := fmt.Sprintf("http://%s/localapi/v0/watch-ipn-bus?mask=%d", apitype.LocalAPIHost, mask)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	resp, err := t.client.DoLocalRequest(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("tailscaled refuses to be watched: %s", resp.Status)
	}
	for decoder := json.NewDecoder(resp.Body); ; {
		var n notice
		if err := decoder.Decode(&n); err != nil {
			return fmt.Errorf("tailscaled ended the connection: %w", err)
		}
		alive()
		send(ctx, events, event{notice: &n})
	}
}

// notice is what matters here of an ipn.Notify, a message on tailscaled's bus.
type notice struct {
	State         *ipn.State // new or, first, current
	ErrMessage    *string    // control's refusal of a login, among others
	LoginFinished *struct{}
	SelfChange    *struct{} // name, addresses or key expiry of this node
	Health        *struct {
		Warnings map[string]struct{ Text string }
	}
}

// pollStatus asks tailscaled for its status every pollInterval, and when told to.
func (t *tailnet) pollStatus(ctx context.Context, poll <-chan struct{}, events chan<- event) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for ctx.Err() == nil {
		asked := time.Now()
		status, err := t.status(ctx)
		send(ctx, events, event{status: status, err: err, asked: asked})
		select {
		case <-tick.C:
		case <-poll:
		case <-ctx.Done():
		}
	}
}

// status asks tailscaled for its status.
func (t *tailnet) status(ctx context.Context) (*ipnstate.Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, pollTimeout, fmt.Errorf("tailscaled does not answer on %s", t.socket))
	defer cancel()
	status, err := t.client.StatusWithoutPeers(ctx)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return status, withoutURL(err)
}

// withoutURL strips the made-up URL that the client asks tailscaled for: it tells operators nothing.
func withoutURL(err error) error {
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		return wrapped.Err
	}
	return err
}

// send sends e unless ctx ends first.
func send(ctx context.Context, events chan<- event, e event) {
	select {
	case events <- e:
	case <-ctx.Done():
	}
}

// view puts together what was seen of tailscaled. It is a plain state machine: time is handed in.
type view struct {
	unreachable error         // tailscaled can't be asked
	backend     ipn.State     // as last reported
	known       bool          // backend was reported since tailscaled was last lost
	changed     time.Time     // when backend was last reported by the bus, or tailscaled was lost
	stopped     time.Time     // since when it is ipn.Stopped
	ran         bool          // it was ipn.Running before
	authFailure string        // control's refusal of the key; kept until a login succeeds
	machineAuth bool          // approval was found missing; kept until connected
	loginError  string        // what the health report says of the login
	storeError  string        // what it says of the state directory
	self        *tailnetState // identity, from the last poll of a running daemon
}

// take adds one event, and reports whether tailscaled should be polled again.
func (v *view) take(e event, now time.Time) (poll bool) {
	switch {
	case e.notice != nil:
		return v.takeNotice(e.notice, now)
	case !e.asked.IsZero() && e.asked.Before(v.changed):
		return true // overtaken by the bus while it was on its way
	case e.err != nil:
		v.unreachable, v.known, v.loginError, v.storeError = e.err, false, "", ""
		if e.asked.IsZero() {
			v.changed = now
		}
		return false
	}
	v.unreachable = nil
	v.takeHealth(e.status.Health)
	backend, _ := ipn.StateFromString(e.status.BackendState) // NoState if it is new to this client
	v.takeBackend(backend, now)
	if self := e.status.Self; self != nil && v.backend == ipn.Running {
		name, _, _ := strings.Cut(self.DNSName, ".") // HostName lacks the "-1" of a clash
		v.self = &tailnetState{hostname: name, online: self.Online}
		if len(e.status.TailscaleIPs) > 0 {
			v.self.ip = e.status.TailscaleIPs[0].String()
		}
		if self.KeyExpiry != nil {
			v.self.keyExpiry = *self.KeyExpiry
		}
	}
	return false
}

// takeNotice adds what came over the bus.
func (v *view) takeNotice(n *notice, now time.Time) (poll bool) {
	v.unreachable = nil
	if n.Health != nil {
		var texts []string
		for _, w := range n.Health.Warnings {
			texts = append(texts, w.Text)
		}
		v.takeHealth(texts)
	}
	if n.LoginFinished != nil {
		v.authFailure = ""
	}
	if n.State != nil {
		v.changed = now
		v.takeBackend(*n.State, now)
		poll = true
	}
	if msg := n.ErrMessage; msg != nil && v.backend != ipn.Running && !strings.Contains(*msg, "consumer fell behind") {
		v.authFailure = *msg
	}
	return poll || n.SelfChange != nil
}

// takeHealth adds the texts of a health report, whose order is random.
func (v *view) takeHealth(texts []string) {
	v.loginError, v.storeError = "", ""
	for _, text := range slices.Sorted(slices.Values(texts)) {
		switch {
		case strings.Contains(text, "last login error was"):
			v.loginError = text
		case strings.HasPrefix(text, "State store failed"):
			v.storeError = text
		}
	}
}

// takeBackend adds a reported state.
func (v *view) takeBackend(s ipn.State, now time.Time) {
	if s == ipn.Stopped && (v.backend != ipn.Stopped || !v.known) {
		v.stopped = now
	}
	v.backend, v.known = s, true
	switch s {
	case ipn.Running:
		v.authFailure, v.machineAuth, v.ran = "", false, true
	case ipn.NeedsMachineAuth:
		v.machineAuth = true
	default:
		if s != ipn.Starting {
			v.self = nil
		}
	}
}

// state draws the conclusion: nil while nothing was seen yet, or the identity of a daemon that has
// just begun to run is still awaited.
func (v *view) state(now time.Time) *tailnetState {
	if v.unreachable == nil && !v.known {
		return nil
	}
	if p := v.problem(now); p != nil {
		return &tailnetState{problem: p}
	}
	return v.self
}

// problem says what keeps the tailnet from being connected, nil if nothing does. What control said
// of key or machine outlives the daemon, which may exit over it.
func (v *view) problem(now time.Time) *problem {
	running := v.unreachable == nil && v.backend == ipn.Running
	switch {
	case running:
		return nil
	case v.authFailure != "":
		return &problem{tailnetAuth, v.authFailure}
	case v.machineAuth:
		return &problem{tailnetMachineAuth, "the node awaits approval"}
	case v.unreachable != nil:
		return &problem{tailnetNotRunning, v.unreachable.Error()}
	case v.storeError != "":
		return &problem{tailnetNotRunning, v.storeError}
	case v.backend == ipn.Stopped && (v.ran || now.Sub(v.stopped) >= stoppedGrace):
		return &problem{tailnetNotRunning, "tailscaled is stopped (tailscale down): run tailscale up"}
	case isControlTrouble(v.loginError):
		return &problem{tailnetConnect, v.loginError}
	case v.loginError != "":
		return &problem{tailnetAuth, v.loginError}
	case v.backend == ipn.NeedsLogin && v.ran:
		return &problem{tailnetAuth, "the node's key has expired, or it was logged out"}
	case v.backend == ipn.NeedsLogin:
		return &problem{tailnetConnect, awaitingLogin}
	default:
		return &problem{tailnetConnect, "tailscaled is in state " + v.backend.String()}
	}
}

// isControlTrouble reports whether a login failed for want of an answer, not of a good key: that is
// how tailscaled begins what it says of either step of a login.
func isControlTrouble(loginError string) bool {
	return strings.Contains(loginError, "fetch control key") || strings.Contains(loginError, "register request")
}
