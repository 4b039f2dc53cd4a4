package tailnet

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// BootWith runs containerboot, the entry point of the sidecar's image, which starts tailscaled and logs it in as its
// environment says: TS_AUTHKEY or another way, which demands tags. It returns at once: containerboot exits by itself
// when the login fails or the node leaves the tailnet.
func (n *Node) BootWith(login ...string) error {
	// It ends its tailscaled on SIGTERM, and would leave it behind on SIGKILL.
	return n.run("containerboot", syscall.SIGTERM, nil, append(login,
		"TS_AUTH_ONCE=true",
		"TS_HOSTNAME="+n.Name,
		"TS_SOCKET="+n.Socket,
		"TS_STATE_DIR="+filepath.Join(n.dir, "state"),
		"TS_KUBE_SECRET=", // else it looks for one wherever it runs in a cluster
		"TS_USERSPACE=true",
		"TS_EXTRA_ARGS=--login-server="+n.tailnet.Control.URL+" --advertise-tags="+strings.Join(n.Tags, ","),
	))
}

// KeepBooting is the kubelet: it runs containerboot and, whenever that exits, runs it again, at once and then after 10,
// 20, 40 seconds and so on, until ctx ends. It returns why it gave up: ctx's end is no error.
func (n *Node) KeepBooting(ctx context.Context, login ...string) error {
	for backoff := time.Duration(0); ; backoff = max(10*time.Second, 2*backoff) {
		if err := n.BootWith(login...); err != nil {
			return fmt.Errorf("starting the sidecar %s: %w", n.Name, err)
		}
		select {
		case <-n.current().Done():
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

// defaultSocket is where containerboot, if it may, makes a link to its node's socket, for a tailscale command without --socket.
const defaultSocket = "/var/run/tailscale/tailscaled.sock"

// removeDefaultSocket removes that link if it points into dir.
func removeDefaultSocket(dir string) error {
	target, err := os.Readlink(defaultSocket)
	if err != nil || !strings.HasPrefix(target, dir+"/") {
		return nil // none, or none of ours
	}
	return os.Remove(defaultSocket)
}
