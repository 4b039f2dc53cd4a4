package main

import (
	"slices"
	"strings"
	"time"

	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
)

// stoppedGrace is how long a daemon may be stopped, at start, before that is a cause of its
// own: a start can pass through it.
const stoppedGrace = 5 * time.Second

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

// awaitingLogin is the detail of a login that nothing is known to hold up.
const awaitingLogin = "tailscaled is not logged in"

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
		Warnings map[string]struct{ Text string }
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
