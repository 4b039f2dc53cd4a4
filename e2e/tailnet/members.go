package tailnet

import (
	"fmt"
	"strings"
	"time"

	"tailscale.com/tailcfg"
)

// Member is a node as the control server knows it, wherever its daemon runs.
type Member struct {
	Name     string // the first label of its DNS name
	Approved bool   // by an administrator, or without need
}

// Members returns all nodes that ever logged in, in order of their login. The
// test server never forgets one, nor does it rename one whose name is taken.
func (c *Control) Members() []Member {
	var members []Member
	for _, node := range c.server.AllNodes() {
		members = append(members, Member{Name: memberName(node), Approved: node.MachineAuthorized})
	}
	return members
}

// ApproveAll lets all nodes in that wait for an administrator, and returns how
// many these were.
func (c *Control) ApproveAll() (approved int) {
	for _, node := range c.server.AllNodes() {
		if !node.MachineAuthorized && c.server.CompleteDeviceApproval(c.URL, c.URL+"/admin", &node.Key) {
			approved++
		}
	}
	return approved
}

// SetMemberExpiry lets the keys of the nodes of that name end at that time, as
// SetKeyExpiry does for a node of this process.
func (c *Control) SetMemberExpiry(name string, at time.Time) error {
	found := false
	for _, node := range c.server.AllNodes() {
		if memberName(node) == name {
			node.KeyExpiry = at
			c.server.UpdateNode(node)
			found = true
		}
	}
	if !found {
		return fmt.Errorf("setting the key expiry of %s: the control server knows no such node", name)
	}
	c.wakeAll()
	return nil
}

func memberName(node *tailcfg.Node) string {
	name, _, _ := strings.Cut(node.Name, ".")
	return name
}
