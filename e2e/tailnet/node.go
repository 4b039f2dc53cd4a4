package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"
	"tailscale.com/types/key"
)

// Node is one machine of a Tailnet: a state directory, a socket, and the daemon
// that uses them while it runs. Make it with [Tailnet.NewNode].
//
// Start, Boot, Kill and Terminate must not be called at the same time.
type Node struct {
	// Name is the host name that the node asks for.
	Name string
	// Socket is the path of its daemon's Unix socket.
	Socket string
	// Tags are asked for when the node logs in, such as "tag:ci".
	Tags []string

	tailnet *Tailnet
	dir     string

	mu      sync.Mutex
	daemon  *process
	history string // what earlier daemons of this node wrote
}

// startTimeout bounds what takes a daemon milliseconds on an idle machine.
const startTimeout = 30 * time.Second

// Start runs tailscaled with the node's state and returns when it answers. A
// node that was logged in before comes back by itself; a new one needs Up.
func (n *Node) Start(ctx context.Context) error {
	err := n.run(n.tailnet.bin.path("tailscaled"), []string{
		"--tun=userspace-networking",
		"--statedir=" + n.dir,
		"--socket=" + n.Socket,
		"--socks5-server=127.0.0.1:0",
		"--outbound-http-proxy-listen=127.0.0.1:0",
	}, nil, syscall.SIGKILL)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	daemon := n.current()
	if err := poll(ctx, func() bool { return !daemon.running() || n.answers(ctx) }); err != nil || !daemon.running() {
		return fmt.Errorf("starting tailscaled of %s: it does not answer (%v):\n%s", n.Name, err, n.Log())
	}
	return nil
}

// run starts a daemon for the node, which must have none.
func (n *Node) run(path string, args, env []string, death syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.daemon != nil {
		if n.daemon.running() {
			return fmt.Errorf("node %s has a daemon already", n.Name)
		}
		n.history += n.daemon.output.String()
	}
	daemon, err := spawn(path, args, append(n.environ(), env...), death)
	n.daemon = daemon
	return err
}

// environ is the environment of the node's programs, which inherit nothing: a
// KUBERNETES_SERVICE_HOST, say, would change what they do.
func (n *Node) environ() []string {
	return []string{
		"HOME=" + n.dir,
		"PATH=" + n.tailnet.bin.Dir, // where containerboot finds tailscaled
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
		"HTTP_PROXY=" + n.tailnet.trap.url,
		"HTTPS_PROXY=" + n.tailnet.trap.url,
		"NO_PROXY=" + n.tailnet.host, // loopback never asks the proxy, other addresses do
	}
}

func (n *Node) current() *process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.daemon
}

func (n *Node) answers(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := n.Client().StatusWithoutPeers(ctx)
	return err == nil
}

// Kill ends the daemon with SIGKILL; its socket file stays. A node without a
// running daemon is not an error.
func (n *Node) Kill() error { return n.end(syscall.SIGKILL) }

// Terminate ends the daemon with SIGTERM and returns when it is gone, and its
// socket file with it.
func (n *Node) Terminate() error { return n.end(syscall.SIGTERM) }

func (n *Node) end(sig syscall.Signal) error {
	daemon := n.current()
	if daemon == nil {
		return nil
	}
	if err := daemon.signal(sig); err != nil {
		return fmt.Errorf("ending the daemon of %s: %w", n.Name, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	return daemon.wait(ctx)
}

// Stop freezes the daemon with SIGSTOP: its socket accepts and never answers. It
// is for nodes made to run with Start; containerboot would be frozen alone.
func (n *Node) Stop() error { return n.signal(syscall.SIGSTOP) }

// Cont lets a stopped daemon go on.
func (n *Node) Cont() error { return n.signal(syscall.SIGCONT) }

func (n *Node) signal(sig syscall.Signal) error {
	daemon := n.current()
	if daemon == nil || !daemon.running() {
		return fmt.Errorf("sending %v to the daemon of %s: it does not run", sig, n.Name)
	}
	return daemon.signal(sig)
}

// Up logs the node in, or takes it back after Down, and returns when it is
// running or when the daemon says why it can't, which may be the fate of an
// earlier Up. An empty key is no key.
func (n *Node) Up(ctx context.Context, authKey string) error {
	args := []string{
		"up", "--reset", "--accept-dns=false",
		"--login-server=" + n.tailnet.Control.URL,
		"--hostname=" + n.Name,
	}
	if authKey != "" {
		args = append(args, "--auth-key="+authKey)
	}
	if len(n.Tags) > 0 {
		args = append(args, "--advertise-tags="+strings.Join(n.Tags, ","))
	}
	return n.tailscale(ctx, args...)
}

// Down disconnects the node; it stays logged in.
func (n *Node) Down(ctx context.Context) error { return n.tailscale(ctx, "down") }

// Logout disconnects the node and throws its key away.
func (n *Node) Logout(ctx context.Context) error { return n.tailscale(ctx, "logout") }

// Serve makes the node, which must be tagged, a host of s: what clients send to port goes to the TCP address to, behind a PROXY
// header of the version given.
func (n *Node) Serve(ctx context.Context, s *Service, port, version int, to string) error {
	return n.tailscale(ctx, "serve", "--service="+string(s.Name), fmt.Sprint("--tcp=", port), fmt.Sprint("--proxy-protocol=", version), "tcp://"+to)
}

// Drain ends that for new clients. The next Serve takes it back.
func (n *Node) Drain(ctx context.Context, s *Service) error {
	return n.tailscale(ctx, "serve", "drain", string(s.Name))
}

// tailscale runs the command-line client against the node's daemon.
func (n *Node) tailscale(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, n.tailnet.bin.path("tailscale"), append([]string{"--socket=" + n.Socket}, args...)...)
	cmd.Env = n.environ()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tailscale %s on %s: %w: %s", args[0], n.Name, errors.Join(err, ctx.Err()), strings.TrimSpace(string(out)))
	}
	return nil
}

// Client returns a client of the daemon's local API.
func (n *Node) Client() *local.Client {
	return &local.Client{Socket: n.Socket, UseSocketOnly: true}
}

// Status returns the daemon's own view.
func (n *Node) Status(ctx context.Context) (*ipnstate.Status, error) {
	st, err := n.Client().Status(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking the daemon of %s for its status: %w", n.Name, err)
	}
	return st, nil
}

// AwaitState waits until the daemon says that it is in a state.
func (n *Node) AwaitState(ctx context.Context, want ipn.State) error {
	last := "no answer"
	err := poll(ctx, func() bool {
		if st, err := n.Client().StatusWithoutPeers(ctx); err == nil {
			last = st.BackendState
		}
		return last == want.String()
	})
	if err != nil {
		return fmt.Errorf("waiting for %v on %s, which says %s: %w", want, n.Name, last, err)
	}
	return nil
}

// IP returns the node's IPv4 address in the tailnet.
func (n *Node) IP(ctx context.Context) (netip.Addr, error) {
	st, err := n.Status(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, ip := range st.TailscaleIPs {
		if ip.Is4() {
			return ip, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("node %s has no tailnet address (%s)", n.Name, st.BackendState)
}

// User returns the login name of the node's owner.
func (n *Node) User(ctx context.Context) (string, error) {
	st, err := n.Status(ctx)
	if err != nil {
		return "", err
	}
	if st.Self == nil {
		return "", fmt.Errorf("node %s is not logged in (%s)", n.Name, st.BackendState)
	}
	return st.User[st.Self.UserID].LoginName, nil
}

func (n *Node) key(ctx context.Context) (key.NodePublic, error) {
	st, err := n.Status(ctx)
	if err != nil {
		return key.NodePublic{}, err
	}
	if st.Self == nil || st.Self.PublicKey.IsZero() {
		return key.NodePublic{}, fmt.Errorf("node %s has no key (%s)", n.Name, st.BackendState)
	}
	return st.Self.PublicKey, nil
}

var (
	socksLine     = regexp.MustCompile(`SOCKS5 listening on (\S+)`)
	httpProxyLine = regexp.MustCompile(`HTTP proxy listening on (\S+)`)
)

// SOCKSAddr returns host:port of the daemon's SOCKS5 server, through which a
// program on this node reaches the tailnet.
func (n *Node) SOCKSAddr() string { return n.current().output.find(socksLine) }

// HTTPProxyAddr returns host:port of the daemon's outbound HTTP proxy.
func (n *Node) HTTPProxyAddr() string { return n.current().output.find(httpProxyLine) }

// HTTPClient returns a client on this node, which reaches the other nodes by
// address or name. Reuse it: about one in a hundred new connections through
// SOCKS stalls for 5 s.
func (n *Node) HTTPClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		Proxy:               http.ProxyURL(&url.URL{Scheme: "socks5", Host: n.SOCKSAddr()}),
		MaxIdleConnsPerHost: 100,
		DisableCompression:  true,
	}}
}

// Log returns what the node's daemons have written.
func (n *Node) Log() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.daemon == nil {
		return n.history
	}
	return n.history + n.daemon.output.String()
}
