package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A lane is a proxy with an upstream of its own and clients. There are two, since an
// upstream that offers HTTP/2 is never spoken to in HTTP/1.1.
type lane struct {
	name     string
	http2    bool
	options  options
	binary   string // of the proxy
	problems *problems
	stalls   *pulse // of the machine
	upstream *upstream
	proxy    *proxytest.Proxy
	before   sample // at rest
	after    sample // at rest again
	peak     float64
	numbers  atomic.Int64 // of the newest request
	lines    []logLine    // after the traffic
	late     int

	mu      sync.Mutex
	results []result
	samples []sample
}

func newLanes(o options, binary string, stalls *pulse) []*lane {
	lanes := []*lane{{name: "HTTP/2", http2: true}, {name: "HTTP/1.1"}}
	for _, l := range lanes {
		l.options, l.binary, l.stalls, l.problems = o, binary, stalls, &problems{lane: l.name}
	}
	return lanes
}

// memoryLimit is GOMEMLIMIT as k8s/deployment.yaml sets it, and containerMemory what the
// container has, in MiB.
const (
	memoryLimit     = "96MiB"
	containerMemory = 128
)

// config makes faults short, and requests wait in line: a quarter of the clients for
// a place, and more than three bodies of unknown length for memory.
func (l *lane) config() string {
	places := max(1, l.clients()*3/4)
	return fmt.Sprintf("[proxy]\ntimeout_secs = %d\ntimeout_retries = 1\nmax_body_mb = %d\nbody_memory_mb = 24\nmax_connections = %d\n",
		int(timeout/time.Second), maxBody/mib, places)
}

// clients is how many clients the lane has: half of all.
func (l *lane) clients() int { return max(1, l.options.clients/2) }

// start starts the upstream and the proxy, and looks at what that holds at rest. The
// lane is to be closed even if it fails.
func (l *lane) start() (err error) {
	if l.upstream, err = startUpstream(l.http2, l.options.seed, l.problems); err != nil {
		return err
	}
	l.proxy, err = proxytest.Start(proxytest.Options{
		Binary: l.binary,
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", l.upstream.server.URL},
		Config: l.config(),
		Env:    []string{"SSL_CERT_FILE=" + l.upstream.caFile, "GOMEMLIMIT=" + memoryLimit, "GORACE=halt_on_error=1"},
	})
	if err != nil {
		return err
	}
	if err := l.proxy.WaitRunning(proxytest.Timeout); err != nil {
		return err
	}
	for range 2 { // the first look costs memory and a descriptor of the poller's that stay
		if l.before, err = takeSample(l.proxy); err != nil {
			return err
		}
	}
	return nil
}

// close ends what still runs.
func (l *lane) close() (err error) {
	if l.proxy != nil {
		err = l.proxy.Stop()
	}
	if l.upstream != nil {
		l.upstream.close()
	}
	return err
}

// traffic has all clients send requests until ctx ends, and looks at the proxy.
func (l *lane) traffic(ctx context.Context, begun time.Time) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var clients, watch sync.WaitGroup
	watch.Go(func() { l.watch(ctx, begun) })
	for i := range l.clients() {
		c := &client{addr: l.proxy.Addr(), problems: l.problems}
		r := rand.New(rand.NewPCG(l.options.seed, ^uint64(i))) // not a number of a request
		clients.Go(func() { c.run(ctx, r, l.next, l.keep) })
	}
	watch.Go(func() {
		select {
		case <-l.proxy.Done():
			l.problems.add("the proxy ended under load; stderr: %.4000s", l.proxy.Stderr())
			cancel()
		case <-ctx.Done():
		}
	})
	clients.Wait()
	cancel()
	watch.Wait()
}

// next returns the plan of the next request.
func (l *lane) next() plan { return newPlan(l.options.seed, int(l.numbers.Add(1))) }

// keep keeps a request's result.
func (l *lane) keep(r result) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.results = append(l.results, r)
}

// state tells how the traffic goes on.
func (l *lane) state() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := fmt.Sprintf("%s: %d requests", l.name, len(l.results))
	if n := len(l.samples); n > 0 {
		last := l.samples[n-1]
		s += fmt.Sprintf(", %.0f MiB, %.0f goroutines, %.0f descriptors", last.rss, last.goroutines, last.descriptors)
	}
	return s
}
