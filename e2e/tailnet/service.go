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
	end     context.CancelFunc
	done    chan struct{}

	mu    sync.Mutex
	host  string   // the name of the node that has the route now
	hosts []string // the names of those that could
}

// Offer makes a service: name is its DNS name. Nodes that are tagged may host it from now on.
func (c *Control) Offer(name string, addrs ...netip.Addr) *Service {
	ctx, end := context.WithCancel(context.Background())
	s := &Service{Name: tailcfg.ServiceName("svc:" + name), addrs: addrs, control: c, end: end, done: make(chan struct{})}
	for _, addr := range addrs {
		kind := ""
		if addr.Is6() {
			kind = "AAAA"
		}
		c.server.AddDNSRecords(tailcfg.DNSRecord{Name: name + "." + Domain, Type: kind, Value: addr.String()})
	}
	go s.steer(ctx)
	return s
}

// Close ends the steering.
func (s *Service) Close() {
	s.end()
	<-s.done
}

// Host returns the name of the node to which clients are routed, "" if there is none.
func (s *Service) Host() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.host
}

// Hosts returns the names of the nodes that are hosts, the oldest first.
func (s *Service) Hosts() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.hosts)
}

// steer keeps the route at an active host until ctx ends.
func (s *Service) steer(ctx context.Context) {
	defer close(s.done)
	server := s.control.server
	mapping, _ := json.Marshal(tailcfg.ServiceIPMappings{s.Name: s.addrs})
	var routes []netip.Prefix
	for _, addr := range s.addrs {
		routes = append(routes, netip.PrefixFrom(addr, addr.BitLen()))
	}
	allowed := map[key.NodePublic]bool{}
	var host key.NodePublic
	for ; ctx.Err() == nil; wait(ctx, 100*time.Millisecond) {
		var active []key.NodePublic
		var names []string
		for _, node := range server.AllNodes() {
			if len(node.Tags) > 0 && !allowed[node.Key] {
				allowed[node.Key] = true
				server.SetNodeCapMap(node.Key, tailcfg.NodeCapMap{tailcfg.NodeAttrServiceHost: {tailcfg.RawMessage(mapping)}})
			}
			if allowed[node.Key] && s.isHost(ctx, node.Key) {
				active, names = append(active, node.Key), append(names, memberName(node))
			}
		}
		s.mu.Lock()
		s.hosts = names
		s.mu.Unlock()
		if slices.Contains(active, host) {
			continue
		}
		if !host.IsZero() {
			wait(ctx, s.control.routeDelay)
			server.SetSubnetRoutes(host, nil)
		}
		name := ""
		host = key.NodePublic{}
		if len(active) > 0 {
			host, name = active[0], names[0]
			server.SetSubnetRoutes(host, routes)
		}
		s.mu.Lock()
		s.host = name
		s.mu.Unlock()
	}
}

func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// isHost asks a node whether it advertises s. One that does not answer does not.
func (s *Service) isHost(ctx context.Context, node key.NodePublic) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "/vip-services", nil)
	if err != nil {
		return false
	}
	resp, err := s.control.server.NodeRoundTripper(node).RoundTrip(req)
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
