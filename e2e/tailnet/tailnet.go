// Package tailnet runs a real tailnet on loopback: tailscaled daemons built from the tailscale module, around a test
// control server, a DERP relay and a STUN server in this process. Nothing in it reaches another machine, and
// [Tailnet.Close] fails if anything tried to.
//
//	bin, err := tailnet.Build(ctx, os.Stderr)
//	tn, err := tailnet.New(bin, tailnet.Options{})
//	defer tn.Close()
//	sidecar, err := tn.NewNode("anthropic-oauth-proxy")
//	err = sidecar.Start()      // a tailscaled that answers on sidecar.Socket
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
	"slices"
	"strings"
	"sync"

	"tailscale.com/client/local"
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

	// Host is the IPv4 address of this machine at which nodes find the servers. Empty: 127.0.0.1, which serves the nodes
	// of NewNode; pods and other machines need one that they can reach.
	Host string
}

// Tailnet is a control server with its relay and the nodes made by NewNode.
type Tailnet struct {
	Control *Control

	bin       *Binaries
	dir, host string
	trap      string // the URL of the HTTP proxy that every daemon is told to use for what is not on loopback
	ends      []func() error
}

// New starts the servers of a tailnet that has no nodes yet.
func New(bin *Binaries, opts Options) (tn *Tailnet, err error) {
	tn = &Tailnet{bin: bin, host: cmp.Or(opts.Host, "127.0.0.1")}
	if tn.dir, err = os.MkdirTemp("/tmp", "tn-"); err != nil { // not a longer one: a Unix socket's name ends at 107 bytes
		return nil, err
	}
	tn.atClose(tn.removeFiles)
	tn.startTrap()
	derp, err := tn.startRelay()
	if err == nil {
		err = tn.startControl(opts, derp)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting a tailnet: %w", err), tn.Close())
	}
	return tn, nil
}

// atClose has Close call end before those of earlier calls.
func (tn *Tailnet) atClose(end func() error) { tn.ends = append(tn.ends, end) }

// Close ends every daemon, then the servers, and removes all files. It returns an error if a daemon tried to reach
// anything outside this machine.
func (tn *Tailnet) Close() (err error) {
	for _, end := range slices.Backward(tn.ends) {
		err = errors.Join(err, end())
	}
	return err
}

// removeFiles removes what is in dir, and the link to a socket there that containerboot, if it may, makes for a tailscale
// command without --socket.
func (tn *Tailnet) removeFiles() error {
	const link = "/var/run/tailscale/tailscaled.sock"
	if target, _ := os.Readlink(link); strings.HasPrefix(target, tn.dir+"/") {
		os.Remove(link)
	}
	return os.RemoveAll(tn.dir)
}

// NewNode returns a node with its own state directory and socket. Its daemon is not running yet. The name becomes its
// host name in the tailnet.
func (tn *Tailnet) NewNode(name string) (*Node, error) {
	dir := filepath.Join(tn.dir, fmt.Sprintf("n%d", len(tn.ends))) // short, as sockets demand
	n := &Node{Name: name, Socket: filepath.Join(dir, "tailscaled.sock"), tailnet: tn, dir: dir}
	n.local = &local.Client{Socket: n.Socket, UseSocketOnly: true}
	tn.atClose(n.Kill)
	return n, os.Mkdir(dir, 0o755)
}

// startTrap starts the HTTP proxy that a hermetic tailnet never calls: a call makes Close fail.
func (tn *Tailnet) startTrap() {
	var mu sync.Mutex
	var caught []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		caught = append(caught, r.Method+" "+r.RequestURI)
		w.WriteHeader(http.StatusForbidden)
	}))
	tn.trap = server.URL
	tn.atClose(func() error {
		server.Close()
		if len(caught) == 0 {
			return nil
		}
		return fmt.Errorf("a daemon tried to leave this machine: %s", strings.Join(caught, ", "))
	})
}
