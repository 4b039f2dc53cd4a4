package tailnet

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"net/http/httptest"

	"tailscale.com/derp/derpserver"
	"tailscale.com/net/stunserver"
	"tailscale.com/tailcfg"
	"tailscale.com/types/key"
	"tailscale.com/types/logger"
)

// startRelay runs the DERP region of a tailnet: a DERP server and a STUN server, with which the daemons find each
// other's addresses before they talk directly.
func (tn *Tailnet) startRelay() (*tailcfg.DERPMap, error) {
	listener, err := net.Listen("tcp", net.JoinHostPort(tn.host, "0"))
	if err != nil {
		return nil, err
	}
	derp := derpserver.New(key.NewNode(), logger.Discard)
	web := &httptest.Server{Listener: listener, Config: &http.Server{
		Handler:  derpserver.Handler(derp),
		ErrorLog: logger.StdLogger(logger.Discard),
		// DERP takes the connection over with an HTTP/1.1 upgrade: no HTTP/2.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
	}}
	web.StartTLS()
	tn.atClose(func() error {
		web.CloseClientConnections()
		web.Close()
		return derp.Close()
	})
	ctx, stop := context.WithCancel(context.Background())
	tn.atClose(func() error { stop(); return nil })
	stun := stunserver.New(ctx)
	if err := stun.Listen(net.JoinHostPort(tn.host, "0")); err != nil {
		return nil, err
	}
	go stun.Serve() // until stop
	return &tailcfg.DERPMap{OmitDefaultRegions: true, Regions: map[int]*tailcfg.DERPRegion{1: {
		RegionID:   1,
		RegionCode: "test",
		Nodes: []*tailcfg.DERPNode{{
			Name:             "1a",
			RegionID:         1,
			HostName:         tn.host,
			IPv4:             tn.host,
			IPv6:             "none",
			STUNPort:         stun.LocalAddr().(*net.UDPAddr).Port,
			STUNTestIP:       tn.host,
			DERPPort:         listener.Addr().(*net.TCPAddr).Port,
			InsecureForTests: true,
		}},
	}}}, nil
}
