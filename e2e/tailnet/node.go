package tailnet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"tailscale.com/client/local"
	"tailscale.com/ipn"
	"tailscale.com/ipn/ipnstate"

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

	mu      sync.Mutex
	daemons []*proxytest.Proxy // all so far, of which the last one may run
	kill    syscall.Signal     // ends it at once
}

// Start runs tailscaled with the node's state and returns when it answers. A node that was logged in before comes back
// by itself; a new one needs Up.
func (n *Node) Start(ctx context.Context) error {
	args := []string{
		"--tun=userspace-networking",
		"--statedir=" + n.dir,
		"--socket=" + n.Socket,
		"--socks5-server=127.0.0.1:0",
		"--outbound-http-proxy-listen=127.0.0.1:0",
	}
	if err := n.run("tailscaled", syscall.SIGKILL, args, nil); err != nil {
		return err
	}
	return n.await(ctx, "an answer", func(string) bool { return true })
}

// run starts a daemon for the node, in place of one that may have ended by itself. It gets the signal kill if this process dies.
func (n *Node) run(program string, kill syscall.Signal, args, env []string) error {
	if err := n.Kill(); err != nil {
		return err
	}
	daemon, err := proxytest.Start(proxytest.Options{
		Binary: n.tailnet.bin.path(program), Args: args, Env: append(n.environ(), env...), DeathSignal: kill,
	})
	if err != nil {
		return fmt.Errorf("starting %s of %s: %w", program, n.Name, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.daemons, n.kill = append(n.daemons, daemon), kill
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
		"HTTP_PROXY=" + n.tailnet.trap.server.URL,
		"HTTPS_PROXY=" + n.tailnet.trap.server.URL,
		"NO_PROXY=" + n.tailnet.host, // loopback never asks the proxy, other addresses do
	}
}

// current returns the last daemon, nil if there was none.
func (n *Node) current() *proxytest.Proxy {
	n.mu.Lock()
	defer n.mu.Unlock()
	if len(n.daemons) == 0 {
		return nil
	}
	return n.daemons[len(n.daemons)-1]
}

// Kill ends the daemon, tailscaled with SIGKILL, so that its socket file stays. A node without a running daemon is not an error.
func (n *Node) Kill() error { return n.end(n.kill) }

// Terminate ends the daemon with SIGTERM and returns when it is gone, and its socket file with it.
func (n *Node) Terminate() error { return n.end(syscall.SIGTERM) }

func (n *Node) end(sig syscall.Signal) error {
	daemon := n.current()
	if daemon == nil {
		return nil
	}
	_ = daemon.Signal(sig) // it may have ended
	if _, err := daemon.Wait(timeout); err != nil {
		return errors.Join(fmt.Errorf("ending the daemon of %s: %w", n.Name, err), daemon.Stop())
	}
	return daemon.Stop()
}

// Freeze stops the daemon with SIGSTOP: its socket accepts and never answers. It is for nodes made to run with Start;
// containerboot would be frozen alone. Thaw lets it go on.
func (n *Node) Freeze() error { return n.current().Signal(syscall.SIGSTOP) }
func (n *Node) Thaw() error   { return n.current().Signal(syscall.SIGCONT) }

// Up logs the node in, or takes it back after Down, and returns when it is running or when the daemon says why it
// can't, which may be the fate of an earlier Up. An empty key is no key.
func (n *Node) Up(ctx context.Context, authKey string) error {
	return n.tailscale(ctx, "up", "--reset", "--accept-dns=false", "--login-server="+n.tailnet.Control.URL,
		"--hostname="+n.Name, "--auth-key="+authKey, "--advertise-tags="+strings.Join(n.Tags, ","))
}

// Down disconnects the node; it stays logged in.
func (n *Node) Down(ctx context.Context) error { return n.tailscale(ctx, "down") }

// Logout disconnects the node and throws its key away.
func (n *Node) Logout(ctx context.Context) error { return n.tailscale(ctx, "logout") }

// Serve makes the node, which must be tagged, a host of s: what clients send to port goes to the TCP address to, behind
// a PROXY header of the version given.
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

// client returns a client of the daemon's local API.
func (n *Node) client() *local.Client {
	return &local.Client{Socket: n.Socket, UseSocketOnly: true}
}

// AwaitState waits until the daemon says that it is in a state.
func (n *Node) AwaitState(ctx context.Context, want ipn.State) error {
	return n.await(ctx, want.String(), func(state string) bool { return state == want.String() })
}

// await waits for an answer of the daemon, whoever has started it, and for a state in it.
func (n *Node) await(ctx context.Context, what string, ok func(state string) bool) error {
	last := "nothing"
	err := poll(ctx, func() bool {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		st, err := n.client().StatusWithoutPeers(ctx)
		if err != nil {
			return false
		}
		last = st.BackendState
		return ok(last)
	})
	if err != nil {
		return fmt.Errorf("waiting for %s of %s, which says %s: %w", what, n.Name, last, err)
	}
	return nil
}

// status is the daemon's own view. It has to be logged in.
func (n *Node) status(ctx context.Context) (*ipnstate.Status, error) {
	st, err := n.client().Status(ctx)
	if err == nil && (st.Self == nil || len(st.TailscaleIPs) == 0) {
		err = fmt.Errorf("it is not logged in (%s)", st.BackendState)
	}
	if err != nil {
		return nil, fmt.Errorf("asking the daemon of %s for its status: %w", n.Name, err)
	}
	return st, nil
}

// IP returns the node's IPv4 address in the tailnet.
func (n *Node) IP(ctx context.Context) (netip.Addr, error) {
	st, err := n.status(ctx)
	if err != nil {
		return netip.Addr{}, err
	}
	return st.TailscaleIPs[0], nil // before that of IPv6
}

// User returns the login name of the node's owner.
func (n *Node) User(ctx context.Context) (string, error) {
	st, err := n.status(ctx)
	if err != nil {
		return "", err
	}
	return st.User[st.Self.UserID].LoginName, nil
}

// SOCKSAddr returns host:port of the daemon's SOCKS5 server, through which a program on this node reaches the tailnet.
func (n *Node) SOCKSAddr() string { return n.says("SOCKS5 listening on ") }

// HTTPProxyAddr returns host:port of the daemon's outbound HTTP proxy.
func (n *Node) HTTPProxyAddr() string { return n.says("HTTP proxy listening on ") }

// says returns how the line goes on in which the daemon has written that, or "".
func (n *Node) says(that string) string {
	_, rest, _ := strings.Cut(n.current().Stderr(), that)
	rest, _, _ = strings.Cut(rest, "\n")
	return rest
}

// HTTPClient returns a client on this node, which reaches the other nodes by address or name. Reuse it: about one in a
// hundred new connections through SOCKS stalls for 5 s.
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
	var text strings.Builder
	for _, daemon := range n.daemons {
		text.WriteString(daemon.Stdout() + daemon.Stderr())
	}
	return text.String()
}

// timeout bounds what takes a daemon a second on an idle machine.
const timeout = time.Minute

// poll calls ok until it returns true, ctx ends or the time is up.
func poll(ctx context.Context, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
