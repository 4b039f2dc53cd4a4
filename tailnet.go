package main

//lint:file-ignore SA1019 The package tailscale.com/client/tailscale is deprecated in favour of client/local, of which
// it is an alias; the project's users chose the older name.

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
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
	// pollInterval is the pause between two looks at tailscaled's status. The bus reports changes at once;
	// the poll finds hangs, and what the bus does not tell: Online, key expiry, renames.
	pollInterval = 10 * time.Second
	// pollTimeout is when a tailscaled that does not answer counts as hung.
	pollTimeout = 3 * time.Second
	// stoppedGrace is how long a daemon may be stopped, at start, before that is a cause of its
	// own: a start can pass through it.
	stoppedGrace = 5 * time.Second
	// lossGrace is how long a loss must last to be logged: on the way to its real cause a daemon
	// passes through other states.
	lossGrace = time.Second
	// The backoff of attempts to watch the bus. It grows only once there has been a connection: a
	// daemon that is started with a bad key lives for some 300 ms, and says so only on its bus.
	minBusBackoff, maxBusBackoff = 100 * time.Millisecond, 500 * time.Millisecond
	// maxLookups is how many callers are looked up at once: more would only queue in tailscaled.
	maxLookups = 16
	// lookupTimeout bounds one lookup, the wait for its turn included.
	lookupTimeout = 10 * time.Second
	// grantLasts is how long a caller's capability is taken for granted.
	grantLasts = time.Minute
	// maxAnswer is the largest answer, or message on the bus, that is taken from tailscaled, in bytes.
	maxAnswer = 1 << 20
	// maxSocketPath is the longest path of a Unix socket that the kernel takes, in bytes.
	maxSocketPath = 107
)

// connectBackoff are the pauses between the looks at a tailnet that is not connected at start.
var connectBackoff = [...]time.Duration{1 * time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second}

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
	tailnetMachineAuth = &problemKind{"TailnetMachineAuth", "Tailnet needs machine authorization", "approve this node in the Tailscale admin console (Machines)"}
	tailnetNotRunning  = &problemKind{"TailnetNotRunning", "Tailnet daemon not running",
		"see the log of the tailscaled container, and that it shares the socket's volume with this one (TAILSCALE_SOCKET, tailscale.socket)"}
	tailnetConnect = &problemKind{"TailnetConnect", "Tailnet connection failed", "check that tailscaled reaches its coordination server"}
)

// awaitingLogin is the detail of a login that nothing is known to hold up.
const awaitingLogin = "tailscaled is not logged in"

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

// identity is who tailscaled says is at the other end of a connection. It is the zero value for
// callers that are not on the tailnet. Nothing else is to be trusted: headers can be forged, and
// tailnet connections reach a userspace tailscaled's neighbours from a loopback address.
type identity struct {
	node    string // full name of the node in the tailnet
	user    string // login name; for a tagged node, which has no user, its tags
	capable bool   // the tailnet's policy grants it tailscale.capability
}

// tailnet follows tailscaled: it watches its bus, polls its status, and identifies callers.
type tailnet struct {
	client   *tailscale.LocalClient
	socket   string
	expected string // hostname
	required string // capability; empty: none
	log      *slog.Logger
	lookups  chan struct{} // limits concurrent WhoIs calls
	polls    chan struct{} // asks for a poll before the next one is due
	state    atomic.Pointer[tailnetState]

	looked, connected       context.Context // done once tailscaled, or its absence, was seen; once there was a connection
	setLooked, setConnected context.CancelFunc

	mu         sync.Mutex // held by see, for what follows
	view       view
	lost       time.Time // when the connection was lost, zero while there is one
	lossLogged bool      // that is in the log
}

// newTailnet returns a tailnet that talks to tailscaled on cfg's Unix socket once followed.
func newTailnet(cfg *config, log *slog.Logger) *tailnet {
	t := &tailnet{socket: cfg.socket, expected: cfg.hostname, required: cfg.capability, log: log}
	t.lookups, t.polls = make(chan struct{}, maxLookups), make(chan struct{}, 1)
	t.looked, t.setLooked = context.WithCancel(context.Background())
	t.connected, t.setConnected = context.WithCancel(context.Background())
	// A transport of our own: the client's retries a missing socket for two seconds, and runs
	// systemctl to explain it.
	t.client = &tailscale.LocalClient{OmitAuth: true, Transport: bounded{&http.Transport{
		DialContext: t.dial, MaxIdleConnsPerHost: maxLookups, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: maxAnswer,
	}}}
	t.state.Store(&tailnetState{problem: &problem{tailnetNotRunning, "tailscaled has not answered yet on " + t.socket}})
	return t
}

// current returns the newest state.
func (t *tailnet) current() tailnetState { return *t.state.Load() }

// wasConnected reports whether there has ever been a connection.
func (t *tailnet) wasConnected() bool { return t.connected.Err() != nil }

// tailnetGauges registers what the metrics page says of t, which is nil where there is no tailnet.
func tailnetGauges(t *tailnet, register func(name, help string, value func() (v float64, ok bool))) {
	if t == nil {
		return
	}
	number := map[bool]float64{true: 1}
	register("tailnet_connected", "1 while tailscaled has its connection to the tailnet, else 0.",
		func() (float64, bool) { return number[t.current().problem == nil], true })
	register("tailnet_control_online", "1 while tailscaled reaches its coordination server, else 0; traffic flows without.",
		func() (float64, bool) { now := t.current(); return number[now.problem == nil && now.online], true })
	register("tailnet_key_expiry_timestamp_seconds", "When the node key expires, in Unix time; absent if it never does.",
		func() (float64, bool) { at := t.current().keyExpiry; return float64(at.Unix()), !at.IsZero() })
}

// connect waits for the first connection. It looks, and looks again after each pause of
// connectBackoff; a connection that comes meanwhile ends the wait at once. Its error is a *problem
// that names the cause, or ctx's.
func (t *tailnet) connect(ctx context.Context) error {
	// At the first look, something must have been seen to speak of.
	err := sleep(ctx, pollTimeout, t.looked.Done())
	for retry := 0; err == nil; retry++ {
		cause := t.current().problem
		switch {
		case cause == nil || t.wasConnected():
			return nil
		case retry < len(connectBackoff):
		case cause.detail == awaitingLogin:
			// After all that time, with no trouble reaching the coordination server, what it lacks is a usable key.
			return &problem{tailnetAuth, awaitingLogin}
		default:
			return cause
		}
		t.log.Warn("tailnet not connected yet, trying again", "error", cause.Error(), "retry", retry+1, "retry_in_secs", int(connectBackoff[retry]/time.Second))
		err = sleep(ctx, connectBackoff[retry], t.connected.Done())
	}
	return err
}

// whoIs asks tailscaled who connected from addr. Not to be known is an answer, not an error. More
// than maxLookups at once wait for their turn.
func (t *tailnet) whoIs(ctx context.Context, addr string) (identity, error) {
	answer, err := ask(ctx, t, lookupTimeout, func(ctx context.Context) (*apitype.WhoIsResponse, error) {
		select {
		case t.lookups <- struct{}{}:
			defer func() { <-t.lookups }()
			return t.client.WhoIsProto(ctx, "tcp", addr) // of both protocols tailscaled would wait for those that it does not know
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	})
	if errors.Is(err, tailscale.ErrPeerNotFound) {
		err = nil
	}
	if err != nil {
		t.log.Debug("looking up a caller failed", "error", err.Error())
	}
	return identityOf(answer, t.required), err
}

// identityOf picks node and user from tailscaled's answer, and whether the capability is among what they are granted.
func identityOf(answer *apitype.WhoIsResponse, capability string) identity {
	node, user := orZero(answer.Node), orZero(answer.UserProfile)
	who := identity{node: strings.TrimSuffix(node.Name, "."), user: cmp.Or(strings.Join(node.Tags, ","), user.LoginName)}
	for granted := range answer.CapMap {
		who.capable = who.capable || string(granted) == capability
	}
	return who
}

// follow keeps the state up to date until ctx ends.
func (t *tailnet) follow(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { t.watchBus(ctx) })
	wg.Go(func() { t.pollStatus(ctx) })
	for sleep(ctx, time.Second, nil) == nil {
		t.see(ctx, nil) // for what only time changes
	}
}

// see adds e, unless it is nil, to what was seen of tailscaled, and publishes the conclusion.
func (t *tailnet) see(ctx context.Context, e *event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if ctx.Err() != nil {
		return // then e is of our own making
	}
	if e != nil && t.view.take(*e, now) && len(t.polls) == 0 {
		t.polls <- struct{}{} // does not block: nobody else sends
	}
	if s := t.view.state(now); s != nil {
		t.publish(s)
	}
}

// publish makes s the current state, and logs what operators have to know: a name that is not the
// expected one, the loss of the connection, once and when it has lasted, and its return.
func (t *tailnet) publish(s *tailnetState) {
	if s.problem == nil && s.hostname != t.current().hostname && s.hostname != t.expected {
		t.log.Warn("this node has another name than tailscale.hostname says; clients reach it under its actual name",
			"tailnet_hostname", s.hostname, "expected", t.expected)
	}
	t.state.Store(s)
	t.setLooked()
	switch now := time.Now(); {
	case s.problem == nil:
		t.setConnected()
		if !t.lost.IsZero() {
			t.log.Info("tailnet connected again", "tailnet_hostname", s.hostname, "tailnet_ip", s.ip, "lost_for_ms", now.Sub(t.lost).Milliseconds())
		}
		t.lost, t.lossLogged = time.Time{}, false
	case !t.wasConnected(): // that is connect's to tell
	case t.lost.IsZero():
		t.lost = now
	case !t.lossLogged && now.Sub(t.lost) >= lossGrace:
		t.lossLogged = true
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

// notice is what matters here of an ipn.Notify, a message on tailscaled's bus.
type notice struct {
	State         *ipn.State // new or, first, current
	ErrMessage    *string    // control's refusal of a login, among others
	LoginFinished *struct{}
	SelfChange    *struct{} // name, addresses or key expiry of this node
	Health        *struct {
		Warnings map[string]warning // by code, such as loginState
	}
}

// warning is a part of tailscaled's health report. Its code tells what it is, and Text is for people.
type warning struct {
	Text string
	Args struct{ Error string } // the cause, if there is one
}

// The codes that matter here.
const (
	loginState = "login-state"        // not logged in; with a cause, the last login failed
	stateStore = "state-store-health" // the state folder can't be used
)

// watchBus sees what tailscaled says on its bus, for as long as ctx lasts.
func (t *tailnet) watchBus(ctx context.Context) {
	for pause := minBusBackoff; ctx.Err() == nil; pause = min(2*pause, maxBusBackoff) {
		heard, err := t.watchBusOnce(ctx)
		t.see(ctx, &event{err: err})
		if heard || !t.wasConnected() {
			pause = minBusBackoff
		}
		sleep(ctx, pause, nil)
	}
}

// watchBusOnce watches the bus until it ends. It returns whether there was a notice, and why it ended.
//
// It is LocalClient.WatchIPNBus with a smaller [notice]: decoding all of ipn.Notify would link 94 KB
// of types, and break with any daemon that changes one of them.
func (t *tailnet) watchBusOnce(ctx context.Context) (heard bool, err error) {
	// More bits are refused by some daemons, or mean other things to them.
	const mask = ipn.NotifyInitialState | ipn.NotifyInitialHealthState | ipn.NotifyNoPrivateKeys
	bus := &url.URL{Scheme: "http", Host: apitype.LocalAPIHost, Path: busPath, RawQuery: fmt.Sprint("mask=", uint64(mask))}
	resp, err := t.client.DoLocalRequest((&http.Request{URL: bus, Header: http.Header{}}).WithContext(ctx))
	if err != nil {
		return false, cmp.Or(errors.Unwrap(err), err) // without the URL, which is made up
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("tailscaled refuses to be watched: %s", resp.Status)
	}
	message := &io.LimitedReader{R: resp.Body}
	for decoder := json.NewDecoder(message); ; heard = true {
		message.N = maxAnswer
		var n notice
		if err := decoder.Decode(&n); message.N <= 0 {
			return heard, errTooLarge
		} else if err != nil {
			return heard, fmt.Errorf("tailscaled ended the connection: %w", err)
		}
		t.see(ctx, &event{notice: &n})
	}
}

// pollStatus sees tailscaled's status every pollInterval, and when asked to, for as long as ctx lasts.
func (t *tailnet) pollStatus(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, pollInterval, t.polls) {
		asked := time.Now()
		status, err := t.status(ctx)
		t.see(ctx, &event{status: status, err: err, asked: asked})
	}
}

// status asks tailscaled for its status.
func (t *tailnet) status(ctx context.Context) (*ipnstate.Status, error) {
	return ask(ctx, t, pollTimeout, t.client.StatusWithoutPeers)
}

// ask has question asked of tailscaled, which must answer within timeout. The answer is never nil.
func ask[T any](ctx context.Context, t *tailnet, timeout time.Duration, question func(context.Context) (*T, error)) (*T, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("tailscaled does not answer on %s", t.socket))
	defer cancel()
	answer, err := question(ctx)
	wrapped, named := errors.AsType[*url.Error](err)
	switch {
	case err != nil && ctx.Err() != nil:
		err = context.Cause(ctx)
	case errors.As(err, new(*http.MaxBytesError)):
		err = errTooLarge
	case named: // the URL is made up, and tells operators nothing
		err = wrapped.Err
	}
	return orZero(answer), err
}

// errTooLarge ends what tailscaled, or whatever listens on its socket, says without end.
var errTooLarge = fmt.Errorf("tailscaled's answer is larger than %d KiB: is it tailscaled that listens on the socket?", maxAnswer>>10)

// busPath is where tailscaled's bus is watched.
const busPath = "/localapi/v0/watch-ipn-bus"

// bounded bounds the answers of a RoundTripper to maxAnswer. The bus has no end; who watches it bounds each message.
type bounded struct{ http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (b bounded) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := b.RoundTripper.RoundTrip(r)
	if err == nil && r.URL.Path != busPath {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxAnswer)
	}
	return resp, err
}

// dial connects to tailscaled's socket.
func (t *tailnet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if n := len(t.socket); n > maxSocketPath {
		return nil, fmt.Errorf("tailscaled's socket: its path has %d bytes, more than the kernel's %d: choose a shorter one (TAILSCALE_SOCKET, tailscale.socket)", n, maxSocketPath)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", t.socket)
	if err != nil {
		return nil, fmt.Errorf("tailscaled's socket: %w", err)
	}
	return conn, nil
}

// sleep waits for d, or less if awoken. Its error is ctx's.
func sleep(ctx context.Context, d time.Duration, awake <-chan struct{}) error {
	select {
	case <-time.After(d):
	case <-awake:
	case <-ctx.Done():
	}
	return ctx.Err()
}

// orZero returns p, or a zero value for nil: whatever JSON may leave out.
func orZero[T any](p *T) *T { return cmp.Or(p, new(T)) }

// view puts together what was seen of tailscaled. It is a plain state machine: time is handed in.
type view struct {
	unreachable string             // why tailscaled can't be asked; empty: it can
	backend     ipn.State          // as last reported
	known       bool               // backend was reported since tailscaled was last lost
	changed     time.Time          // when the bus last reported backend, or ended: answers to older polls are overtaken
	stopped     time.Time          // since when it is ipn.Stopped
	ran         bool               // it was ipn.Running before
	authFailure string             // control's refusal of the key; kept until a login succeeds
	machineAuth bool               // approval was found missing; kept until connected
	health      map[string]warning // as last reported by the bus
	self        *tailnetState      // identity, from the last poll of a running daemon
}

// take adds one event, and reports whether tailscaled should be polled again.
func (v *view) take(e event, now time.Time) (poll bool) {
	switch {
	case e.notice != nil:
		return v.takeNotice(e.notice, now)
	case e.asked.IsZero(): // the bus has ended
		v.changed = now
	case e.asked.Before(v.changed):
		return true // overtaken by the bus while it was on its way
	}
	if e.err != nil {
		v.unreachable, v.known, v.health = e.err.Error(), false, nil
		return false
	}
	v.unreachable = ""
	backend, _ := ipn.StateFromString(e.status.BackendState) // NoState if it is new to this client
	v.takeBackend(backend, now)
	if self := e.status.Self; self != nil && v.backend == ipn.Running {
		name, _, _ := strings.Cut(self.DNSName, ".") // HostName lacks the "-1" of a clash
		v.self = &tailnetState{hostname: name, online: self.Online, keyExpiry: *orZero(self.KeyExpiry)}
		if len(e.status.TailscaleIPs) > 0 {
			v.self.ip = e.status.TailscaleIPs[0].String()
		}
	}
	return false
}

// takeNotice adds what came over the bus.
func (v *view) takeNotice(n *notice, now time.Time) (poll bool) {
	v.unreachable = ""
	if n.Health != nil {
		v.health = n.Health.Warnings
	}
	if n.LoginFinished != nil {
		v.authFailure = ""
	}
	if n.State != nil {
		v.changed = now
		v.takeBackend(*n.State, now)
	}
	if msg := n.ErrMessage; msg != nil && v.backend != ipn.Running && !strings.Contains(*msg, "consumer fell behind") {
		v.authFailure = *msg
	}
	return n.State != nil || n.SelfChange != nil
}

// takeBackend adds a reported state.
func (v *view) takeBackend(s ipn.State, now time.Time) {
	if s == ipn.Stopped && (v.backend != ipn.Stopped || !v.known) {
		v.stopped = now
	}
	v.backend, v.known = s, true
	if s == ipn.Running {
		v.authFailure, v.machineAuth, v.ran = "", false, true
		return
	}
	v.machineAuth, v.self = v.machineAuth || s == ipn.NeedsMachineAuth, nil
}

// state draws the conclusion: nil while nothing was seen yet, or the identity of a daemon that has
// just begun to run is still awaited.
func (v *view) state(now time.Time) *tailnetState {
	if v.unreachable == "" && !v.known {
		return nil
	}
	if p := v.problem(now); p != nil {
		return &tailnetState{problem: p}
	}
	return v.self
}

// problem says what keeps the tailnet from being connected, nil if nothing does: the first that holds.
// What control said of key or machine outlives the daemon, which may exit over it.
func (v *view) problem(now time.Time) *problem {
	stopped := v.backend == ipn.Stopped && (v.ran || now.Sub(v.stopped) >= stoppedGrace)
	login, store := v.health[loginState], v.health[stateStore]
	// A login that fails for want of an answer, not of a good key: so begins what tailscaled says of either step of it.
	unanswered := strings.HasPrefix(login.Args.Error, "fetch control key") || strings.HasPrefix(login.Args.Error, "register request")
	for _, row := range []struct {
		holds   bool
		problem *problem
	}{
		{v.unreachable == "" && v.backend == ipn.Running, nil},
		{v.authFailure != "", &problem{tailnetAuth, v.authFailure}},
		{v.machineAuth, &problem{tailnetMachineAuth, "the node awaits approval"}},
		{v.unreachable != "", &problem{tailnetNotRunning, v.unreachable}},
		{store.Text != "", &problem{tailnetNotRunning, store.Text}},
		{stopped, &problem{tailnetNotRunning, "tailscaled is stopped (tailscale down): run tailscale up"}},
		{unanswered, &problem{tailnetConnect, login.Text}},
		{login.Args.Error != "", &problem{tailnetAuth, login.Text}},
		{v.backend == ipn.NeedsLogin && v.ran, &problem{tailnetAuth, "the node's key has expired, or it was logged out"}},
		{v.backend == ipn.NeedsLogin, &problem{tailnetConnect, awaitingLogin}},
	} {
		if row.holds {
			return row.problem
		}
	}
	return &problem{tailnetConnect, "tailscaled is in state " + v.backend.String()}
}
