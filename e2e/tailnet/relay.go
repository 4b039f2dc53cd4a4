package tailnet

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// relay is the DERP region of a tailnet: a DERP server and a STUN server, with
// which the daemons find each other's addresses before they talk directly.
type relay struct {
	host     string
	derp     *derpserver.Server
	web      *httptest.Server
	stunPort int
	stopSTUN context.CancelFunc
	stunDone chan struct{}
}

func startRelay(host string) (*relay, error) {
	ctx, cancel := context.WithCancel(context.Background())
	stun := stunserver.New(ctx)
	if err := stun.Listen(net.JoinHostPort(host, "0")); err != nil {
		cancel()
		return nil, fmt.Errorf("listening for STUN: %w", err)
	}
	listener, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		cancel()
		return nil, fmt.Errorf("listening for DERP: %w", err)
	}
	r := &relay{
		host:     host,
		derp:     derpserver.New(key.NewNode(), logger.Discard),
		stunPort: stun.LocalAddr().(*net.UDPAddr).Port,
		stopSTUN: cancel,
		stunDone: make(chan struct{}),
	}
	go func() {
		defer close(r.stunDone)
		stun.Serve()
	}()
	r.web = httptest.NewUnstartedServer(derpserver.Handler(r.derp))
	r.web.Listener.Close() // httptest's own, on loopback
	r.web.Listener = listener
	r.web.Config.ErrorLog = log.New(io.Discard, "", 0)
	// DERP takes the connection over with an HTTP/1.1 upgrade: no HTTP/2.
	r.web.Config.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){}
	r.web.StartTLS()
	return r, nil
}

// derpMap describes the relay to the daemons.
func (r *relay) derpMap() *tailcfg.DERPMap {
	return &tailcfg.DERPMap{
		OmitDefaultRegions: true,
		Regions: map[int]*tailcfg.DERPRegion{1: {
			RegionID:   1,
			RegionCode: "test",
			Nodes: []*tailcfg.DERPNode{{
				Name:             "1a",
				RegionID:         1,
				HostName:         r.host,
				IPv4:             r.host,
				IPv6:             "none",
				STUNPort:         r.stunPort,
				STUNTestIP:       r.host,
				DERPPort:         r.web.Listener.Addr().(*net.TCPAddr).Port,
				InsecureForTests: true,
			}},
		}},
	}
}

func (r *relay) close() {
	r.stopSTUN()
	<-r.stunDone
	r.web.CloseClientConnections()
	r.web.Close()
	r.derp.Close()
}
