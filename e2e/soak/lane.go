package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// A lane is a proxy with an upstream of its own and clients. There are two, since an upstream that offers HTTP/2 is never spoken to
// in HTTP/1.1.
type lane struct {
	name     string
	protocol fakeanthropic.Protocol
	options  options
	problems problems
	upstream *upstream
	proxy    *proxytest.Proxy
	before   sample       // at rest
	samples  []sample     // in the traffic
	peak     float64      // of resident memory, MiB
	numbers  atomic.Int64 // of the newest request
	lines    []logLine    // of the log, in the end
	late     int
	atEnd    int // requests in flight at SIGTERM

	mu      sync.Mutex
	results []result
}

// thinking is how long a client rests between two requests, on average: the machine is to be busy, but no attempt late for lack of a
// processor.
const thinking = 150 * time.Millisecond

// run is the lane's life; stalls are those of the machine. An error says that there is nothing to judge.
func (l *lane) run(ctx context.Context, binary string, stalls *pulse) (err error) {
	if l.upstream, err = startUpstream(l.protocol, l.options.seed, &l.problems); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.upstream.Close()) }()
	l.proxy, err = proxytest.Start(proxytest.Options{
		Binary: binary,
		Args:   proxytest.Serve(l.upstream.URL),
		// Faults are short, and requests wait in line: a quarter of the clients for a place, and more than three bodies of unknown
		// length for memory.
		Config: fmt.Sprintf("[proxy]\ntimeout_secs = %d\ntimeout_retries = 1\nmax_body_mb = %d\nbody_memory_mb = 24\nmax_connections = %d\n",
			int(timeout.Seconds()), maxBody/mib, max(1, l.options.clients*3/8)),
		Env: append(l.upstream.Env(), "GOMEMLIMIT=96MiB", "GORACE=halt_on_error=1"), // the limit is that of k8s/deployment.yaml
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.proxy.Stop()) }()
	if err := l.proxy.WaitRunning(proxytest.Timeout); err != nil {
		return err
	}
	for range 2 { // the first look costs memory and a descriptor of the poller's that stay
		if l.before, err = l.look(); err != nil {
			return err
		}
	}
	sending, stop := context.WithTimeout(ctx, l.options.duration)
	defer stop()
	var clients, watcher sync.WaitGroup
	watcher.Go(func() { l.watch(sending, stop) })
	for i := range l.options.clients / 2 {
		r := rand.New(rand.NewPCG(l.options.seed, ^uint64(i))) // not a number of a request
		clients.Go(func() { l.use(sending, r) })
	}
	clients.Wait()
	stop()
	watcher.Wait()
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	l.verify(stalls)
	return nil
}

// use is one client: it sends requests until ctx ends, and finishes the last.
func (l *lane) use(ctx context.Context, r *rand.Rand) {
	c := &client{addr: l.proxy.Addr()}
	defer c.hangUp()
	for ctx.Err() == nil {
		l.send(c, l.next())
		select {
		case <-time.After(time.Duration(r.ExpFloat64() * float64(thinking))):
		case <-ctx.Done():
		}
	}
}

// next returns the plan of the next request.
func (l *lane) next() plan { return newPlan(l.options.seed, int(l.numbers.Add(1))) }

// send has c do what p says, and keeps the result.
func (l *lane) send(c *client, p plan) {
	r, err := c.do(p)
	if err != nil {
		l.problems.add("%v: %v", p, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.results = append(l.results, r)
}

// lastStreams are under way when the proxy is told to end.
const lastStreams = 4

// end ends the proxy with streams under way, which it has to finish; how they ended is seen with all other requests.
func (l *lane) end() {
	var streams sync.WaitGroup
	defer streams.Wait()
	for range lastStreams {
		p := l.next()
		for p.fault != noFault || p.pace*time.Duration(p.answer.size)/time.Duration(eventSize) < time.Second {
			p = l.next()
		}
		streams.Go(func() {
			c := &client{addr: l.proxy.Addr()}
			defer c.hangUp()
			l.send(c, p)
		})
		if err := proxytest.Poll(func() string {
			if l.upstream.seen(p.number) > 0 {
				return ""
			}
			return "it does not reach the upstream"
		}); err != nil {
			l.problems.add("%v: %v", p, err)
		}
	}
	if err := l.proxy.Signal(syscall.SIGTERM); err != nil {
		l.problems.add("%v", err)
	}
	if code, err := l.proxy.Wait(proxytest.Timeout); err != nil || code != 0 {
		l.problems.add("after SIGTERM the proxy ended with exit code %d (%v)", code, err)
	}
	if said := l.proxy.Stderr(); said != "" {
		l.problems.add("the proxy wrote to stderr: %.4000s", said)
	}
}
