package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// Node is one machine of a Tailnet: a state directory, a socket, and the daemon that uses them while it runs. Make it
// with [Tailnet.NewNode]. What starts and ends its daemon must not be called at the same time.
type Node struct {
	Name   string   // the host name that the node asks for
	Socket string   // the path of its daemon's Unix socket
	Tags   []string // that are asked for when the node logs in, such as "tag:ci"

	tailnet *Tailnet
	dir     string
	local   *local.Client    // of the daemon
	daemon  *proxytest.Proxy // the last one, nil if there was none
	kill    syscall.Signal   // ends it at once
}

// Start runs tailscaled with the node's state and returns when it answers. A node that was logged in before comes back
// by itself; a new one needs Up.
func (n *Node) Start() error {
	err := n.run(syscall.SIGKILL, nil, "tailscaled",
		"--tun=userspace-networking",
		"--statedir="+n.dir,
		"--socket="+n.Socket,
		"--socks5-server=127.0.0.1:0")
	if err != nil {
		return err
	}
	return n.Await()
}

// BootWith runs containerboot, the entry point of the sidecar's image, which starts tailscaled and logs it in as its
// environment says: TS_AUTHKEY or another way, which demands tags. It returns at once: containerboot exits by itself
// when the login fails or the node leaves the tailnet.
func (n *Node) BootWith(login ...string) error {
	// It ends its tailscaled on SIGTERM, and would leave it behind on SIGKILL.
	return n.run(syscall.SIGTERM, append(login,
		"TS_AUTH_ONCE=true",
		"TS_HOSTNAME="+n.Name,
		"TS_SOCKET="+n.Socket,
		"TS_STATE_DIR="+filepath.Join(n.dir, "state"),
		"TS_KUBE_SECRET=", // else it looks for one wherever it runs in a cluster
		"TS_USERSPACE=true",
		"TS_EXTRA_ARGS=--login-server="+n.tailnet.Control.URL+" --advertise-tags="+strings.Join(n.Tags, ","),
	), "containerboot")
}

// KeepBooting is the kubelet: it runs containerboot and, whenever that exits, runs it again, at once and then after 10,
// 20, 40 seconds and so on, until ctx ends. It returns why it gave up: ctx's end is no error.
func (n *Node) KeepBooting(ctx context.Context, login ...string) error {
	for backoff := time.Duration(0); ; backoff = max(10*time.Second, 2*backoff) {
		if err := n.BootWith(login...); err != nil {
			return err
		}
		select {
		case <-n.daemon.Done():
		case <-ctx.Done():
			return n.Kill()
		}
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			return nil
		}
	}
}

// run starts a daemon for the node, in place of one that may have ended by itself. It gets the signal kill if this process dies.
func (n *Node) run(kill syscall.Signal, env []string, program string, args ...string) error {
	err := n.Kill()
	if err == nil {
		n.kill = kill
		n.daemon, err = proxytest.Start(proxytest.Options{
			Binary: n.tailnet.bin.path(program), Args: args, Env: append(n.environ(), env...), DeathSignal: kill,
			Redirect: fmt.Sprintf(">>'%s' 2>&1", n.log()),
		})
	}
	if err != nil {
		return fmt.Errorf("starting %s of %s: %w", program, n.Name, err)
	}
	return nil
}

// environ is the environment of the node's programs, which inherit nothing: a KUBERNETES_SERVICE_HOST, say, would
// change what they do.
func (n *Node) environ() []string {
	return []string{
		"HOME=" + n.dir,
		"PATH=" + n.tailnet.bin.dir, // where containerboot finds tailscaled
		"TS_LOGS_DIR=" + n.dir,
		"TS_NO_LOGS_NO_SUPPORT=true",
		"TS_ASSUME_NETWORK_UP_FOR_TEST=1", // or a machine without a network never logs in
		"TS_PANIC_IF_HIT_MAIN_CONTROL=1",
		"TS_DISABLE_PORTMAPPER=1",
		// 1.102 writes the map when the home relay changes, whatever control allows, and would
		// come back Running from it: whether it had found its relay by then is chance.
		"TS_USE_CACHED_NETMAP=false",
		"TS_NETSTACK_KEEPALIVE_IDLE=15s", // as in k8s/
		"TS_NETSTACK_KEEPALIVE_INTERVAL=5s",
		"TS_NETCHECK_GENERATE_204_URL=" + n.tailnet.Control.URL + "/generate_204",
		"HTTP_PROXY=" + n.tailnet.trap,
		"HTTPS_PROXY=" + n.tailnet.trap,
		"NO_PROXY=" + n.tailnet.host, // loopback never asks the proxy, other addresses do
	}
}

// Kill ends the daemon, tailscaled with SIGKILL, so that its socket file stays. A node without a running daemon is not an error.
func (n *Node) Kill() error { return n.End(n.kill) }

// End ends the daemon with a signal and returns when it is gone: after SIGTERM, its socket file with it.
func (n *Node) End(sig syscall.Signal) error {
	if n.daemon == nil {
		return nil
	}
	_ = n.daemon.Signal(sig) // it may have ended
	_, err := n.daemon.Wait(proxytest.Timeout)
	return errors.Join(err, n.daemon.Stop())
}

// Signal sends a signal to the daemon. After SIGSTOP and until SIGCONT, its socket accepts and never answers: that is for
// nodes made to run with Start, as containerboot would be stopped alone.
func (n *Node) Signal(sig syscall.Signal) error { return n.daemon.Signal(sig) }

// Up logs the node in, or takes it back after "down", and returns when it is running or when the daemon says why it
// can't, which may be the fate of an earlier Up. An empty key is no key.
func (n *Node) Up(ctx context.Context, authKey string) error {
	return n.Tailscale(ctx, "up", "--reset", "--accept-dns=false", "--login-server="+n.tailnet.Control.URL,
		"--hostname="+n.Name, "--auth-key="+authKey, "--advertise-tags="+strings.Join(n.Tags, ","))
}

// Tailscale runs the command-line client against the node's daemon.
func (n *Node) Tailscale(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, n.tailnet.bin.path("tailscale"), append([]string{"--socket=" + n.Socket}, args...)...)
	cmd.Env = n.environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tailscale %s on %s: %w: %s", args[0], n.Name, errors.Join(err, ctx.Err()), strings.TrimSpace(string(out)))
	}
	return nil
}

// Await waits until the daemon answers, whoever has started it, and is in one of the states, if any are given.
func (n *Node) Await(states ...ipn.State) error {
	return proxytest.Poll(func() string {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		st, err := n.local.StatusWithoutPeers(ctx)
		in := func(state ipn.State) bool { return state.String() == st.BackendState }
		if err == nil && (states == nil || slices.ContainsFunc(states, in)) {
			return ""
		}
		return fmt.Sprintf("%s is not in a state of %v: %+v, %v", n.Name, states, st, err)
	})
}

// Self is a node as its tailnet knows it.
type Self struct {
	IP   string // of IPv4
	User string // the login name of its owner
}

// Self asks the daemon, which has to be logged in.
func (n *Node) Self(ctx context.Context) (Self, error) {
	st, err := n.local.Status(ctx)
	if err != nil || st.Self == nil || len(st.TailscaleIPs) == 0 {
		return Self{}, fmt.Errorf("%s is not logged in: %+v, %v", n.Name, st, err)
	}
	return Self{st.TailscaleIPs[0].String(), st.User[st.Self.UserID].LoginName}, nil
}

// Route returns the name of the node to which this one sends what is for addr, "" if to none.
func (n *Node) Route(ctx context.Context, addr netip.Addr) string {
	if st, err := n.local.Status(ctx); err == nil {
		for _, peer := range st.Peer {
			if peer.AllowedIPs != nil && peer.AllowedIPs.ContainsFunc(func(p netip.Prefix) bool { return p.Contains(addr) }) {
				return peer.HostName
			}
		}
	}
	return ""
}

// SOCKSAddr returns host:port of the daemon's SOCKS5 server, through which a program on this node reaches the tailnet.
func (n *Node) SOCKSAddr() string {
	lines := strings.Split(n.Log(), "SOCKS5 listening on ") // one for each daemon so far
	addr, _, _ := strings.Cut(lines[len(lines)-1], "\n")
	return addr
}

// HTTPClient returns a client on this node, which reaches the other nodes by address or name. Reuse it: about one in a
// hundred new connections through SOCKS stalls for 5 s. Its timeout only keeps a failing test from hanging.
func (n *Node) HTTPClient() *http.Client {
	return &http.Client{Timeout: 5 * time.Minute, Transport: &http.Transport{
		Proxy:               http.ProxyURL(&url.URL{Scheme: "socks5", Host: n.SOCKSAddr()}),
		MaxIdleConnsPerHost: 100,
		DisableCompression:  true,
	}}
}

// Log returns what the node's daemons have written.
func (n *Node) Log() string {
	text, _ := os.ReadFile(n.log()) // none yet
	return string(text)
}

func (n *Node) log() string { return filepath.Join(n.dir, "daemons.log") }
