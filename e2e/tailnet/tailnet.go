// Package tailnet runs a real tailnet on loopback: tailscaled daemons built from the tailscale module, around a test
// control server, a DERP relay and a STUN server in this process. Nothing in it reaches another machine, and
// [Tailnet.Close] fails if anything tried to.
//
//	bin, err := tailnet.Build(ctx, os.Stderr)
//	tn, err := tailnet.New(bin, tailnet.Options{})
//	defer tn.Close()
//	sidecar, err := tn.NewNode("anthropic-oauth-proxy")
//	err = sidecar.Start(ctx)      // a tailscaled that answers on sidecar.Socket
//	err = sidecar.Up(ctx, "")     // …and that is logged in and running
//
// A connection to a node's tailnet address ends at 127.0.0.1 on the same port: that is how a userspace tailscaled hands
// over what it receives.
package tailnet

import (
	"cmp"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// Domain is the MagicDNS domain of every test tailnet: a node named "laptop" has the DNS name "laptop.tailnet.test.".
const Domain = "tailnet.test"

// Options are the fixed properties of a Tailnet. The zero value is a tailnet that lets every node in.
type Options struct {
	// AuthKey is the only key with which a node may log in. Empty: any key, or none. The test control server asks for it
	// whenever a daemon registers, restarts included, so leave it empty where daemons restart.
	AuthKey string

	// ApproveMachines makes new nodes wait for Control.ApproveAll.
	ApproveMachines bool

	LoginDelay time.Duration // how long every login takes at least
	RouteDelay time.Duration // how long a service has no host between two

	// Host is the IPv4 address of this machine at which nodes find the servers. Empty: 127.0.0.1, which serves the nodes
	// of NewNode; pods and other machines need one that they can reach.
	Host string
}

// Tailnet is a control server with its relay and the nodes made by NewNode. Its methods may be called from several goroutines.
type Tailnet struct {
	// Control is the coordination server of this tailnet.
	Control *Control

	bin   *Binaries
	dir   string
	host  string
	relay *relay
	trap  *trap

	mu    sync.Mutex
	nodes []*Node
}

// New starts the servers of a tailnet that has no nodes yet.
func New(bin *Binaries, opts Options) (*Tailnet, error) {
	opts.Host = cmp.Or(opts.Host, "127.0.0.1")
	parent := os.TempDir()
	if len(parent) > 60 { // a Unix socket's name ends at 107 bytes
		parent = "/tmp"
	}
	dir, err := os.MkdirTemp(parent, "tn-")
	if err != nil {
		return nil, fmt.Errorf("making the tailnet's directory: %w", err)
	}
	tn := &Tailnet{bin: bin, dir: dir, host: opts.Host, trap: startTrap()}
	if tn.relay, err = startRelay(opts.Host); err == nil {
		tn.Control, err = startControl(opts, &tn.relay.region)
	}
	if err != nil {
		return nil, errors.Join(err, tn.Close())
	}
	return tn, nil
}

// Close ends every daemon, then the servers, and removes all files. It returns an error if a daemon tried to reach
// anything outside this machine.
func (tn *Tailnet) Close() error {
	tn.mu.Lock()
	nodes := tn.nodes
	tn.nodes = nil
	tn.mu.Unlock()

	var errs []error
	for _, n := range nodes {
		errs = append(errs, n.Kill())
	}
	if tn.Control != nil {
		errs = append(errs, tn.Control.Stop())
	}
	if tn.relay != nil {
		tn.relay.close()
	}
	return errors.Join(append(errs, tn.trap.close(), removeDefaultSocket(tn.dir), os.RemoveAll(tn.dir))...)
}

// NewNode returns a node with its own state directory and socket. Its daemon is not running yet. The name becomes its
// host name in the tailnet.
func (tn *Tailnet) NewNode(name string) (*Node, error) {
	tn.mu.Lock()
	defer tn.mu.Unlock()
	dir := filepath.Join(tn.dir, fmt.Sprintf("n%d", len(tn.nodes)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the directory of node %s: %w", name, err)
	}
	n := &Node{Name: name, Socket: filepath.Join(dir, "tailscaled.sock"), tailnet: tn, dir: dir}
	tn.nodes = append(tn.nodes, n)
	return n, nil
}

// trap is the HTTP proxy that every daemon is told to use for what is not on loopback. A hermetic tailnet never calls
// it: a call is a test failure.
type trap struct {
	server *httptest.Server

	mu     sync.Mutex
	caught []string
}

func startTrap() *trap {
	t := &trap{}
	t.server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.caught = append(t.caught, r.Method+" "+r.RequestURI)
		w.WriteHeader(http.StatusForbidden)
	}))
	return t
}

// close ends the trap and reports what it caught.
func (t *trap) close() error {
	t.server.Close()
	if len(t.caught) > 0 {
		return fmt.Errorf("a daemon tried to leave this machine: %s", strings.Join(t.caught, ", "))
	}
	return nil
}
