package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// hostname is the proxy's name in the tailnet.
const hostname = "anthropic-oauth-proxy"

// answer is the fake API, slow enough for its streaming to show.
var answer = fakeanthropic.API{Deltas: 8, Interval: 200 * time.Millisecond}

// scene is all that the demo runs. Fields are nil as far as it has not come.
type scene struct {
	upstream *fakeanthropic.Server
	tailnet  *tailnet.Tailnet
	sidecar  *tailnet.Node // the proxy's
	laptop   *tailnet.Node // a client's
	proxy    *proxytest.Proxy
}

// start starts everything. The scene is to be closed even if it fails.
func (s *scene) start(ctx context.Context, progress io.Writer) error {
	bin, err := tailnet.Build(ctx, progress)
	if err != nil {
		return err
	}
	if s.upstream, err = fakeanthropic.Start(fakeanthropic.HTTP2, answer); err != nil {
		return err
	}
	if s.tailnet, err = tailnet.New(bin, tailnet.Options{}); err != nil {
		return err
	}
	if s.sidecar, err = s.connect(ctx, hostname); err != nil {
		return err
	}
	if s.laptop, err = s.connect(ctx, "laptop"); err != nil {
		return err
	}
	fmt.Fprintln(progress, "building the proxy")
	s.proxy, err = proxytest.Start(proxytest.Options{
		Env: s.upstream.Env(),
		Config: fmt.Sprintf("[tailscale]\nsocket = %q\n[proxy]\nlisten_addr = \"127.0.0.1:0\"\nupstream_url = %q\n",
			s.sidecar.Socket, s.upstream.URL),
	})
	if err != nil {
		return err
	}
	return s.proxy.WaitRunning(proxytest.Timeout)
}

// connect makes a node and logs it in.
func (s *scene) connect(ctx context.Context, name string) (*tailnet.Node, error) {
	node, err := s.tailnet.NewNode(name)
	if err != nil {
		return nil, err
	}
	if err := node.Start(ctx); err != nil {
		return nil, err
	}
	return node, node.Up(ctx, "")
}

// close ends everything in reverse order and removes it.
func (s *scene) close() error {
	var errs []error
	if s.proxy != nil {
		errs = append(errs, s.proxy.Stop(), proxytest.Cleanup())
	}
	if s.tailnet != nil {
		errs = append(errs, s.tailnet.Close())
	}
	if s.upstream != nil {
		errs = append(errs, s.upstream.Close())
	}
	return errors.Join(errs...)
}
