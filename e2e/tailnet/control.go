package tailnet

import (
	"anthropic-oauth-proxy/e2e/proxytest"
	"context"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/tstest/integration/testcontrol"
	"tailscale.com/types/logger"
)

// Control is the coordination server: it lets nodes in, tells them of each other, and can be taken away and brought
// back. It knows nodes by their names, wherever their daemons run.
type Control struct {
	// URL is what nodes are given as their login server.
	URL string

	server *testcontrol.Server

	mu    sync.Mutex
	down  bool
	conns []net.Conn // all so far, as http.Server forgets those that become Noise ones
}

func (tn *Tailnet) startControl(opts Options, derp *tailcfg.DERPMap) error {
	listener, err := net.Listen("tcp", net.JoinHostPort(tn.host, "0"))
	if err != nil {
		return err
	}
	c := &Control{URL: "http://" + listener.Addr().String()}
	c.server = &testcontrol.Server{
		Logf:               logger.Discard,
		ExplicitBaseURL:    c.URL,
		DERPMap:            derp,
		DNSConfig:          &tailcfg.DNSConfig{Proxied: true},
		MagicDNSDomain:     Domain,
		RequireAuthKey:     opts.AuthKey,
		RequireMachineAuth: opts.ApproveMachines,
		TagOwners:          map[string][]string{}, // not nil: nodes get the tags that they ask for
		AllOnline:          true,
	}
	web := &http.Server{Handler: c.withKeys(), ErrorLog: logger.StdLogger(logger.Discard), ConnContext: c.accept}
	go web.Serve(listener)
	tn.Control = c
	tn.atClose(func() error { c.Stop(); return web.Close() })
	return nil
}

// accept cuts a connection, now or later.
func (c *Control) accept(ctx context.Context, conn net.Conn) context.Context {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.down {
		conn.Close()
	}
	c.conns = append(c.conns, conn)
	return ctx
}

// Stop cuts all connections, those to come too, as those of a server that is down.
func (c *Control) Stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = true
	for _, conn := range c.conns {
		conn.Close() // unless it is closed already
	}
	c.conns = nil
}

// Start brings a stopped server back, with all it knew.
func (c *Control) Start() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = false
}

// Members returns the names of all nodes that ever logged in, in order of their login. The test server never forgets
// one, nor does it rename one whose name is taken.
func (c *Control) Members() []string { return memberNames(c.server.AllNodes()) }

func memberNames(nodes []*tailcfg.Node) (names []string) {
	for _, node := range nodes {
		names = append(names, memberName(node))
	}
	return names
}

// memberName is the first label of a node's DNS name.
func memberName(node *tailcfg.Node) string {
	name, _, _ := strings.Cut(node.Name, ".")
	return name
}

// ApproveAll lets all nodes in that wait for an administrator, and returns how many these were.
func (c *Control) ApproveAll() (approved int) {
	for _, node := range c.server.AllNodes() {
		if !node.MachineAuthorized && c.server.CompleteDeviceApproval(c.URL, c.URL+"/admin", &node.Key) {
			approved++
		}
	}
	return approved
}

// SetMemberExpiry lets the keys of the nodes of that name end at that time: at once if it is past. A later time brings
// expired nodes back.
func (c *Control) SetMemberExpiry(name string, at time.Time) error {
	return c.modify(name, func(node *tailcfg.Node) { node.KeyExpiry = at })
}

// Rename renames the nodes of a name, as an administrator or a clash of names does.
func (c *Control) Rename(name, to string) error {
	return c.modify(name, func(node *tailcfg.Node) { node.Name = to + "." + Domain + "." })
}

// Grant gives all nodes the app capabilities on all nodes, and takes those of an earlier call away.
func (c *Control) Grant(capabilities ...string) {
	grants := tailcfg.PeerCapMap{}
	for _, capability := range capabilities {
		grants[tailcfg.PeerCapability(capability)] = nil
	}
	c.server.SetGlobalAppCaps(grants)
}

// modify changes what the control server knows of the nodes of a name and tells all nodes. It waits for a node that has
// told how it is reached: until then its own updates race with ours, which replace the whole.
func (c *Control) modify(name string, change func(*tailcfg.Node)) error {
	return proxytest.Poll(func() string {
		wrong := "the control server does not know how node " + name + " is reached"
		for _, node := range c.server.AllNodes() {
			if memberName(node) == name && !node.DiscoKey.IsZero() && node.HomeDERP != 0 && len(node.Endpoints) > 0 {
				change(node)
				c.server.UpdateNode(node)
				wrong = ""
			}
		}
		return wrong
	})
}
