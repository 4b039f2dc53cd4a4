package main

//lint:file-ignore SA1019 The package tailscale.com/client/tailscale is deprecated in favour of client/local, of which
// it is an alias; the project's users chose the older name.

import (
	"bufio"
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
	// pollInterval is how often tailscaled is asked for its status. The bus reports changes at once;
	// the poll finds hangs, and what the bus does not tell: Online, key expiry, renames.
	pollInterval = 10 * time.Second
	// pollTimeout is when a tailscaled that does not answer counts as hung.
	pollTimeout = 3 * time.Second
	// lossSettles is how long a loss must last to be logged.
	lossSettles = time.Second
	// Pauses between attempts to watch the bus. They grow only once there has been a connection: a
	// daemon that is started with a bad key lives for some 300 ms, and says so only on its bus.
	minRedial, maxRedial = 100 * time.Millisecond, 500 * time.Millisecond
	// maxLookups is how many callers are looked up at once: more would only queue in tailscaled.
	maxLookups = 16
	// lookupTimeout bounds one look-up, the wait for its turn included.
	lookupTimeout = 10 * time.Second
	// maxSocketPath is the longest path of a Unix socket that Linux takes, in bytes.
	maxSocketPath = 107
	// maxMessage bounds what tailscaled may say at once, in bytes.
	maxMessage = 1 << 20
)

// connectBackoff are the pauses between the looks at a tailnet that is not connected at start.
var connectBackoff = []time.Duration{1 * time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 16 * time.Second}

// tailnet follows tailscaled: it watches its bus, polls its status, and identifies callers.
type tailnet struct {
	client   *tailscale.LocalClient
	socket   string
	expected string // hostname
	log      *slog.Logger

	lost      time.Time // when the connection was lost, zero while there is one; used by follow alone
	told      bool      // that is in the log
	state     atomic.Pointer[tailnetState]
	connected context.Context // done at the first connection
	reached   context.CancelFunc
	looked    context.Context // done once tailscaled, or its absence, was seen
	seen      context.CancelFunc
	lookups   chan struct{} // limits concurrent WhoIs calls
}

// newTailnet returns a tailnet that talks to tailscaled on the given Unix socket once followed.
func newTailnet(socket, expectedHostname string, log *slog.Logger) *tailnet {
	t := &tailnet{socket: socket, expected: expectedHostname, log: log, lookups: make(chan struct{}, maxLookups)}
	t.connected, t.reached = context.WithCancel(context.Background())
	t.looked, t.seen = context.WithCancel(context.Background())
	// A transport of our own: the client's retries a missing socket for two seconds, and runs systemctl to explain it.
	t.client = &tailscale.LocalClient{OmitAuth: true, Transport: &http.Transport{
		DialContext: t.dial, MaxIdleConnsPerHost: maxLookups, IdleConnTimeout: time.Minute,
	}}
	t.state.Store(&tailnetState{problem: &problem{tailnetNotRunning, "tailscaled has not answered yet on " + socket}})
	return t
}

// dial connects to tailscaled.
func (t *tailnet) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	if len(t.socket) > maxSocketPath {
		return nil, fmt.Errorf("tailscaled's socket: the path has %d bytes, %d is the most that the kernel takes: choose a shorter one (TAILSCALE_SOCKET, tailscale.socket)", len(t.socket), maxSocketPath)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", t.socket)
	if err != nil {
		return nil, fmt.Errorf("tailscaled's socket: %w", err)
	}
	return conn, nil
}

// current returns the newest state.
func (t *tailnet) current() tailnetState { return *t.state.Load() }

// wasConnected reports whether there has ever been a connection.
func (t *tailnet) wasConnected() bool { return t.connected.Err() != nil }

// connect waits for the first connection. It looks, and looks again after each pause of
// connectBackoff; a connection that comes meanwhile ends the wait at once. Its error is a *problem
// that names the cause, or ctx's.
func (t *tailnet) connect(ctx context.Context) error {
	// At the first look, something must have been seen to speak of.
	if err := wait(ctx, t.looked, pollTimeout); err != nil {
		return err
	}
	for retry := 0; ; retry++ {
		cause := t.current().problem
		switch {
		case cause == nil || t.wasConnected():
			return nil
		case retry == len(connectBackoff) && cause.detail == awaitingLogin:
			// All that time, with no trouble reaching the coordination server: it lacks a usable key.
			return &problem{tailnetAuth, awaitingLogin}
		case retry == len(connectBackoff):
			return cause
		}
		pause := connectBackoff[retry]
		t.log.Warn("Tailnet not connected yet, trying again", "error", cause.Error(), "retry", retry+1, "retry_in_secs", int(pause/time.Second))
		if err := wait(ctx, t.connected, pause); err != nil {
			return err
		}
	}
}

// wait waits until something has happened, for d at most. Its error is ctx's.
func wait(ctx, happened context.Context, d time.Duration) error {
	select {
	case <-happened.Done():
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err()
}

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
		t.reached()
	}
	t.seen()
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
	req, _ := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	resp, err := t.client.DoLocalRequest(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("tailscaled refuses to be watched: %s", resp.Status)
	}
	lines := bufio.NewScanner(resp.Body)
	for lines.Buffer(nil, maxMessage); lines.Scan(); {
		var n notice
		if err := json.Unmarshal(lines.Bytes(), &n); err != nil {
			return fmt.Errorf("tailscaled says what can't be read: %w", err)
		}
		alive()
		send(ctx, events, event{notice: &n})
	}
	return fmt.Errorf("tailscaled ended the connection: %w", cmp.Or(lines.Err(), io.EOF))
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

// gauges registers what is known of the tailnet.
func (t *tailnet) gauges(register func(name, help string, value func() (float64, bool))) {
	register("tailnet_connected", "1 while tailscaled has its connection to the tailnet, else 0.", func() (float64, bool) {
		return indicator(t.current().problem == nil), true
	})
	register("tailnet_control_online", "1 while tailscaled reaches its coordination server, else 0; traffic flows without.", func() (float64, bool) {
		now := t.current()
		return indicator(now.problem == nil && now.online), true
	})
	register("tailnet_key_expiry_timestamp_seconds", "When the node key expires, in Unix time; absent if it never does.", func() (float64, bool) {
		expiry := t.current().keyExpiry
		return float64(expiry.Unix()), !expiry.IsZero()
	})
}

// indicator is 1 for true and 0 for false.
func indicator(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// identity is who tailscaled says is at the other end of a connection. It is the zero value for
// callers that are not on the tailnet. Nothing else is to be trusted: headers can be forged, and
// tailnet connections reach a userspace tailscaled's neighbours from a loopback address.
type identity struct {
	node string // full name of the node in the tailnet
	user string // login name; for a tagged node, which has no user, its tags
}

// whoIs asks tailscaled who connected from addr. Not to be known is an answer, not an error.
func (t *tailnet) whoIs(ctx context.Context, addr string) (identity, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
	defer cancel()
	select {
	case t.lookups <- struct{}{}:
		defer func() { <-t.lookups }()
	case <-ctx.Done():
		return identity{}, ctx.Err()
	}
	answer, err := t.client.WhoIs(ctx, addr)
	if errors.Is(err, tailscale.ErrPeerNotFound) {
		return identity{}, nil
	}
	if err != nil {
		t.log.Debug("looking up a caller failed", "error", err.Error())
		return identity{}, err
	}
	return identityOf(answer), nil
}

// identityOf picks node and user from tailscaled's answer.
func identityOf(answer *apitype.WhoIsResponse) identity {
	var who identity
	if node := answer.Node; node != nil {
		who.node = strings.TrimSuffix(node.Name, ".")
		who.user = strings.Join(node.Tags, ",")
	}
	if who.user == "" && answer.UserProfile != nil {
		who.user = answer.UserProfile.LoginName
	}
	return who
}
