package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// hostname is the proxy's name in the tailnet.
const hostname = "anthropic-oauth-proxy"

// scene is all that the demo runs.
type scene struct {
	laptop  *tailnet.Node // a client's
	proxy   *proxytest.Proxy
	closers []func() error // of what runs so far
}

// start starts everything. The scene is to be closed even if it fails.
func (s *scene) start(ctx context.Context, progress io.Writer) error {
	bin, err := tailnet.Build(ctx, progress)
	if err != nil {
		return err
	}
	// It is slow enough for its streaming to show.
	upstream, err := fakeanthropic.Start(fakeanthropic.HTTP2, fakeanthropic.API{Deltas: 8, Interval: 200 * time.Millisecond})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, upstream.Close)
	tn, err := tailnet.New(bin, tailnet.Options{})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, tn.Close)
	sidecar, err := connect(ctx, tn, hostname)
	if err != nil {
		return err
	}
	if s.laptop, err = connect(ctx, tn, "laptop"); err != nil {
		return err
	}
	fmt.Fprintln(progress, "building the proxy")
	s.closers = append(s.closers, proxytest.Cleanup)
	s.proxy, err = proxytest.Start(proxytest.Options{
		Args: []string{"-listen", "127.0.0.1:0", "-upstream", upstream.URL},
		Env:  append(upstream.Env(), "TAILSCALE_SOCKET="+sidecar.Socket),
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, s.proxy.Stop)
	return s.proxy.WaitRunning(proxytest.Timeout)
}

// connect makes a node and logs it in.
func connect(ctx context.Context, tn *tailnet.Tailnet, name string) (*tailnet.Node, error) {
	node, err := tn.NewNode(name)
	if err != nil {
		return nil, err
	}
	if err := node.Start(); err != nil {
		return nil, err
	}
	return node, node.Up(ctx, "")
}

// close ends everything in reverse order and removes it.
func (s *scene) close() (err error) {
	for _, end := range slices.Backward(s.closers) {
		err = errors.Join(err, end())
	}
	return err
}
