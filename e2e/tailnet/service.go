package tailnet

import (
	"context"
	"encoding/json"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
)

// Service is a Tailscale Service: one name and its addresses, of which tagged nodes may say that they are hosts.
//
// testcontrol has none. So this does what is known of the real control server: it asks the nodes what they host, as that
// one does (GET /vip-services, over their map connection), and routes the addresses to one active host, the oldest, for as
// long as that stays active and answers. The real one has been seen to take up to 15 s for that.
type Service struct {
	Name tailcfg.ServiceName

	addrs   []netip.Addr // of IPv4 and IPv6
	control *Control

	mu    sync.Mutex
	host  string   // the name of the node that has the route now
	hosts []string // the names of those that could
}

// Offer makes a service that lasts as long as ctx: name is its DNS name. Nodes that are tagged may host it from now on.
func (c *Control) Offer(ctx context.Context, name string, addrs ...netip.Addr) *Service {
	s := &Service{Name: tailcfg.ServiceName("svc:" + name), addrs: addrs, control: c}
	for _, addr := range addrs {
		kind := map[bool]string{true: "AAAA"}[addr.Is6()]
		c.server.AddDNSRecords(tailcfg.DNSRecord{Name: name + "." + Domain, Type: kind, Value: addr.String()})
	}
	go s.steer(ctx)
	return s
}

// Hosts returns the names of the nodes that are hosts, the oldest first, and of the one to which clients are routed, "" if
// there is none.
func (s *Service) Hosts() (all []string, routed string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.hosts, s.host
}

// steer keeps the route at an active host until ctx ends.
func (s *Service) steer(ctx context.Context) {
	server := s.control.server
	mapping, _ := json.Marshal(tailcfg.ServiceIPMappings{s.Name: s.addrs})
	var routes []netip.Prefix
	for _, addr := range s.addrs {
		routes = append(routes, netip.PrefixFrom(addr, addr.BitLen()))
	}
	allowed := map[key.NodePublic]bool{}
	var host *tailcfg.Node // nil if there is none
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) {
		var active []*tailcfg.Node
		for _, node := range server.AllNodes() {
			if len(node.Tags) > 0 && !allowed[node.Key] {
				allowed[node.Key] = true
				server.SetNodeCapMap(node.Key, tailcfg.NodeCapMap{tailcfg.NodeAttrServiceHost: {tailcfg.RawMessage(mapping)}})
			}
			if allowed[node.Key] && s.isHost(node.Key) {
				active = append(active, node)
			}
		}
		if host != nil && !slices.ContainsFunc(active, func(n *tailcfg.Node) bool { return n.Key == host.Key }) {
			server.SetSubnetRoutes(host.Key, nil)
			host = nil
		}
		if host == nil && len(active) > 0 {
			host = active[0]
			server.SetSubnetRoutes(host.Key, routes)
		}
		s.mu.Lock()
		s.hosts, s.host = memberNames(active), ""
		if host != nil {
			s.host = memberName(host)
		}
		s.mu.Unlock()
	}
}

// isHost asks a node whether it advertises s. One that does not answer does not.
func (s *Service) isHost(node key.NodePublic) bool {
	client := &http.Client{Transport: s.control.server.NodeRoundTripper(node), Timeout: 2 * time.Second}
	resp, err := client.Get("http://node/vip-services")
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	var answer tailcfg.C2NVIPServicesResponse
	if json.NewDecoder(resp.Body).Decode(&answer) != nil {
		return false
	}
	return slices.ContainsFunc(answer.VIPServices, func(v *tailcfg.VIPService) bool { return v.Name == s.Name && v.Active })
}
