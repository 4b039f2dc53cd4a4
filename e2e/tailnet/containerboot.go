package tailnet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Boot runs containerboot, the entry point of the sidecar's image, which starts
// tailscaled and logs it in with the key. It returns at once: containerboot
// exits by itself when the login fails or the node leaves the tailnet.
func (n *Node) Boot(authKey string) error { return n.BootWith("TS_AUTHKEY=" + authKey) }

// BootWith is Boot with another way to log in, as containerboot reads it from its environment. Tags are asked for, which ways
// other than an auth key demand.
func (n *Node) BootWith(login ...string) error {
	args := "--login-server=" + n.tailnet.Control.URL
	if len(n.Tags) > 0 {
		args += " --advertise-tags=" + strings.Join(n.Tags, ",")
	}
	return n.run(n.tailnet.bin.path("containerboot"), nil, append(login,
		"TS_AUTH_ONCE=true",
		"TS_HOSTNAME="+n.Name,
		"TS_SOCKET="+n.Socket,
		"TS_STATE_DIR="+filepath.Join(n.dir, "state"),
		"TS_KUBE_SECRET=", // else it looks for one wherever it runs in a cluster
		"TS_USERSPACE=true",
		"TS_SOCKS5_SERVER=127.0.0.1:0",
		"TS_OUTBOUND_HTTP_PROXY_LISTEN=127.0.0.1:0",
		"TS_EXTRA_ARGS="+args,
	), syscall.SIGTERM)
}

// KeepBooting is the kubelet: it runs containerboot and, whenever that exits,
// runs it again, at once and then after 10, 20, 40 seconds and so on, until ctx
// ends. It returns why it gave up: ctx's end is no error.
func (n *Node) KeepBooting(ctx context.Context, authKey string) error {
	for backoff := time.Duration(0); ; backoff = max(10*time.Second, 2*backoff) {
		if err := n.Boot(authKey); err != nil {
			return fmt.Errorf("starting the sidecar %s: %w", n.Name, err)
		}
		if n.current().wait(ctx) != nil {
			return n.Kill()
		}
		select {
		case <-time.After(backoff):
		case <-ctx.Done():
			return nil
		}
	}
}

// defaultSocket is where containerboot, if it may, makes a link to its node's
// socket, for a tailscale command without --socket.
const defaultSocket = "/var/run/tailscale/tailscaled.sock"

// removeDefaultSocket removes that link if it points into dir.
func removeDefaultSocket(dir string) error {
	target, err := os.Readlink(defaultSocket)
	if err != nil || !strings.HasPrefix(target, dir+"/") {
		return nil // none, or none of ours
	}
	return os.Remove(defaultSocket)
}

// killTree sends SIGKILL to a process and all its descendants: containerboot
// would leave its tailscaled behind, in a process group of its own.
func killTree(pid int) error {
	descendants := children(pid)
	err := syscall.Kill(pid, syscall.SIGKILL)
	for _, child := range descendants {
		_ = killTree(child) // it may have ended with its parent
	}
	return err
}

// children lists the processes that any thread of a process has started.
func children(pid int) (pids []int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, list := range lists {
		text, _ := os.ReadFile(list) // the thread may have ended meanwhile
		for _, field := range strings.Fields(string(text)) {
			if child, err := strconv.Atoi(field); err == nil {
				pids = append(pids, child)
			}
		}
	}
	return pids
}
