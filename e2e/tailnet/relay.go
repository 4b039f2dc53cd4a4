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

// relay is the DERP region of a tailnet: a DERP server and a STUN server, with which the daemons find each other's
// addresses before they talk directly.
type relay struct {
	region tailcfg.DERPMap
	close  func()
}

func startRelay(host string) (*relay, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return nil, fmt.Errorf("listening for DERP: %w", err)
	}
	derp := derpserver.New(key.NewNode(), logger.Discard)
	web := &httptest.Server{Listener: listener, Config: &http.Server{
		Handler:  derpserver.Handler(derp),
		ErrorLog: log.New(io.Discard, "", 0),
		// DERP takes the connection over with an HTTP/1.1 upgrade: no HTTP/2.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}}
	web.StartTLS()
	ctx, stopSTUN := context.WithCancel(context.Background())
	r := &relay{close: func() {
		stopSTUN()
		web.CloseClientConnections()
		web.Close()
		derp.Close()
	}}
	stun := stunserver.New(ctx)
	if err := stun.Listen(net.JoinHostPort(host, "0")); err != nil {
		r.close()
		return nil, fmt.Errorf("listening for STUN: %w", err)
	}
	go stun.Serve() // until stopSTUN
	r.region = tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{1: {
		RegionID:   1,
		RegionCode: "test",
		Nodes: []*tailcfg.DERPNode{{
			Name:             "1a",
			RegionID:         1,
			HostName:         host,
			IPv4:             host,
			IPv6:             "none",
			STUNPort:         stun.LocalAddr().(*net.UDPAddr).Port,
			STUNTestIP:       host,
			DERPPort:         listener.Addr().(*net.TCPAddr).Port,
			InsecureForTests: true,
		}},
	}}}
	return r, nil
}
