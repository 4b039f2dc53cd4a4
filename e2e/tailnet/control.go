package tailnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// Control is the coordination server: it lets nodes in, tells them of each
// other, and can be taken away and brought back.
type Control struct {
	// URL is what nodes are given as their login server.
	URL string

	server     *testcontrol.Server
	addr       string
	loginDelay atomic.Int64 // nanoseconds

	mu     sync.Mutex
	front  *http.Server // nil while stopped
	conns  *connTracker
	grants tailcfg.PeerCapMap
}

func startControl(opts Options, derp *tailcfg.DERPMap) (*Control, error) {
	c := &Control{}
	c.server = &testcontrol.Server{
		Logf:               logger.Discard,
		DERPMap:            derp,
		DNSConfig:          &tailcfg.DNSConfig{Proxied: true},
		MagicDNSDomain:     Domain,
		RequireAuthKey:     opts.AuthKey,
		RequireMachineAuth: opts.ApproveMachines,
		TagOwners:          map[string][]string{}, // not nil: nodes get the tags that they ask for
		AllOnline:          true,
		MaybeRateLimitRegister: func() (bool, string, string) {
			time.Sleep(time.Duration(c.loginDelay.Load()))
			return false, "", ""
		},
	}
	ln, err := listenOutsideEphemeralPorts(opts.Host)
	if err != nil {
		return nil, fmt.Errorf("listening for the control server: %w", err)
	}
	c.addr = ln.Addr().String()
	c.URL = "http://" + c.addr
	c.server.ExplicitBaseURL = c.URL
	c.serve(ln)
	return c, nil
}

// listenOutsideEphemeralPorts listens on a port that the kernel gives to nobody
// who asks for any free one, so that it is still free after a Stop.
func listenOutsideEphemeralPorts(host string) (ln net.Listener, err error) {
	for range 50 {
		port := 20000 + rand.IntN(12000) // Linux hands out 32768 and up
		if ln, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))); err == nil {
			return ln, nil
		}
	}
	return nil, err
}

// serve answers on ln until Stop.
func (c *Control) serve(ln net.Listener) {
	c.conns = &connTracker{Listener: ln, open: map[net.Conn]struct{}{}}
	c.front = &http.Server{Handler: c.withKeys(), ErrorLog: log.New(io.Discard, "", 0)}
	go c.front.Serve(c.conns)
}

// Start brings a stopped server back on the same port, with all it knew.
func (c *Control) Start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.front != nil {
		return errors.New("the control server runs already")
	}
	ln, err := net.Listen("tcp", c.addr)
	if err != nil {
		return fmt.Errorf("listening for the control server again: %w", err)
	}
	c.serve(ln)
	return nil
}

// Stop cuts all connections and refuses new ones, as a server that is down.
// Stopping twice is not an error.
func (c *Control) Stop() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.front == nil {
		return nil
	}
	err := c.front.Close()
	c.conns.closeAll() // http.Server has forgotten those that became Noise connections
	c.front = nil
	return err
}

// SetLoginDelay makes every later login take at least d.
func (c *Control) SetLoginDelay(d time.Duration) { c.loginDelay.Store(int64(d)) }

// Approve lets a node in that waits for an administrator.
func (c *Control) Approve(ctx context.Context, n *Node) error {
	nodeKey, err := n.key(ctx)
	if err != nil {
		return err
	}
	if !c.server.CompleteDeviceApproval(c.URL, c.URL+"/admin", &nodeKey) {
		return fmt.Errorf("approving node %s: the control server does not know it", n.Name)
	}
	return nil
}

// SetKeyExpiry lets the key of a node end at that time: at once if it is past.
// A later time brings an expired node back.
func (c *Control) SetKeyExpiry(ctx context.Context, n *Node, at time.Time) error {
	return c.modify(ctx, n, func(node *tailcfg.Node) { node.KeyExpiry = at })
}

// SetTags replaces the tags of a node, such as "tag:ci".
func (c *Control) SetTags(ctx context.Context, n *Node, tags ...string) error {
	return c.modify(ctx, n, func(node *tailcfg.Node) { node.Tags = tags })
}

// SetHostname renames a node, as an administrator or a clash of names does.
func (c *Control) SetHostname(ctx context.Context, n *Node, name string) error {
	return c.modify(ctx, n, func(node *tailcfg.Node) { node.Name = name + "." + Domain + "." })
}

// SetOwner gives a node to the user who owns another one.
func (c *Control) SetOwner(ctx context.Context, n, like *Node) error {
	ownerKey, err := like.key(ctx)
	if err != nil {
		return err
	}
	owner := c.server.Node(ownerKey)
	if owner == nil {
		return fmt.Errorf("finding the owner of node %s: the control server does not know it", like.Name)
	}
	return c.modify(ctx, n, func(node *tailcfg.Node) { node.User = owner.User })
}

// modify changes what the control server knows of a node and tells all nodes.
func (c *Control) modify(ctx context.Context, n *Node, change func(*tailcfg.Node)) error {
	nodeKey, err := n.key(ctx)
	if err != nil {
		return err
	}
	node, err := c.settled(ctx, nodeKey)
	if err != nil {
		return fmt.Errorf("changing node %s: %w", n.Name, err)
	}
	change(node)
	c.server.UpdateNode(node)
	c.wakeAll() // UpdateNode wakes all nodes but the changed one
	return nil
}

// Grant gives all nodes the app capabilities on all nodes, and takes those of an earlier call away.
func (c *Control) Grant(capabilities ...string) {
	grants := tailcfg.PeerCapMap{}
	for _, capability := range capabilities {
		grants[tailcfg.PeerCapability(capability)] = nil
	}
	c.mu.Lock()
	c.grants = grants
	c.mu.Unlock()
	c.wakeAll()
}

// wakeAll has all nodes fetch what has changed.
func (c *Control) wakeAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.server.SetGlobalAppCaps(c.grants)
}

// settled returns a node that has told the control server how it is reached.
// Until then the node's own updates race with ours, which replace the whole.
func (c *Control) settled(ctx context.Context, nodeKey key.NodePublic) (*tailcfg.Node, error) {
	var node *tailcfg.Node
	err := poll(ctx, func() bool {
		node = c.server.Node(nodeKey)
		return node != nil && !node.DiscoKey.IsZero() && node.HomeDERP != 0 && len(node.Endpoints) > 0
	})
	return node, err
}

// connTracker is a listener that can close what it accepted.
type connTracker struct {
	net.Listener

	mu   sync.Mutex
	open map[net.Conn]struct{}
}

func (t *connTracker) Accept() (net.Conn, error) {
	conn, err := t.Listener.Accept()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open[conn] = struct{}{}
	return &trackedConn{Conn: conn, tracker: t}, nil
}

func (t *connTracker) closeAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for conn := range t.open {
		conn.Close()
	}
}

// trackedConn forgets itself when it is closed.
type trackedConn struct {
	net.Conn
	tracker *connTracker
}

func (c *trackedConn) Close() error {
	c.tracker.mu.Lock()
	delete(c.tracker.open, c.Conn)
	c.tracker.mu.Unlock()
	return c.Conn.Close()
}
