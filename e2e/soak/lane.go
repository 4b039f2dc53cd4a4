package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/procfs"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A lane is a proxy with an upstream of its own and clients. There are two, since an
// upstream that offers HTTP/2 is never spoken to in HTTP/1.1.
type lane struct {
	name     string
	options  options
	problems problems
	dir      string
	upstream *upstream
	proxy    *proxytest.Proxy
	before   sample       // at rest
	after    sample       // at rest again
	numbers  atomic.Int64 // of the newest request
	lines    []logLine    // of the log, in the end
	late     int
	atEnd    int // requests in flight at SIGTERM

	mu      sync.Mutex
	results []result
	samples []sample
}

const (
	// memoryLimit is GOMEMLIMIT as k8s/deployment.yaml sets it, and containerMemory what
	// the container has, in MiB.
	memoryLimit     = "96MiB"
	containerMemory = 128
	// thinking is how long a client rests between two requests, on average: the
	// machine is to be busy, but no attempt late for lack of a processor.
	thinking = 150 * time.Millisecond
	// sampleEvery is the time between two samples.
	sampleEvery = time.Second
)

// config makes faults short, and requests wait in line: a quarter of the clients for
// a place, and more than three bodies of unknown length for memory.
func (l *lane) config() string {
	return fmt.Sprintf("[proxy]\ntimeout_secs = %d\ntimeout_retries = 1\nmax_body_mb = %d\nbody_memory_mb = 24\nmax_connections = %d\n",
		int(timeout/time.Second), maxBody/mib, max(1, l.clients()*3/4))
}

// clients is how many clients the lane has: half of all.
func (l *lane) clients() int { return l.options.clients / 2 }

// start starts the upstream and the proxy, and looks at what that holds at rest. The
// lane is to be closed even if it fails.
func (l *lane) start(binary string, http2 bool) (err error) {
	l.problems.lane = l.name
	if l.dir, err = os.MkdirTemp("", "soak-"); err != nil {
		return err
	}
	l.upstream = startUpstream(http2, l.options.seed, &l.problems)
	caFile, err := l.upstream.writeCA(l.dir)
	if err != nil {
		return err
	}
	l.proxy, err = proxytest.Start(proxytest.Options{
		Binary: binary,
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", l.upstream.server.URL},
		Config: l.config(),
		Env:    []string{"SSL_CERT_FILE=" + caFile, "GOMEMLIMIT=" + memoryLimit, "GORACE=halt_on_error=1"},
	})
	if err != nil {
		return err
	}
	if err := l.proxy.WaitRunning(proxytest.Timeout); err != nil {
		return err
	}
	for range 2 { // the first look costs memory and a descriptor of the poller's that stay
		if l.before, err = l.look(); err != nil {
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
	return errors.Join(err, os.RemoveAll(l.dir))
}

// traffic has all clients send requests until ctx ends, and looks at the proxy.
func (l *lane) traffic(ctx context.Context, begun time.Time) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var clients, watchers sync.WaitGroup
	for i := range l.clients() {
		r := rand.New(rand.NewPCG(l.options.seed, ^uint64(i))) // not a number of a request
		clients.Go(func() { l.use(ctx, r) })
	}
	watchers.Go(func() { l.watch(ctx, begun) })
	watchers.Go(func() {
		select {
		case <-l.proxy.Done():
			l.problems.add("the proxy ended under load; stderr: %.4000s", l.proxy.Stderr())
			cancel()
		case <-ctx.Done():
		}
	})
	clients.Wait()
	cancel()
	watchers.Wait()
}

// use is one client: it sends requests until ctx ends, and finishes the last.
func (l *lane) use(ctx context.Context, r *rand.Rand) {
	c := &client{addr: l.proxy.Addr(), problems: &l.problems}
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
	r := c.do(p)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.results = append(l.results, r)
}

// A sample is what a proxy holds at one time.
type sample struct {
	at          time.Duration // after the traffic began
	rss         float64       // MiB
	peak        float64       // most of that so far
	heap        float64       // MiB, garbage included
	goroutines  float64
	descriptors float64
	queued      float64 // requests in line for a place or for memory
}

// look takes a sample of the proxy's metrics and of its process.
func (l *lane) look() (sample, error) {
	m, err := l.proxy.Metrics()
	if err != nil {
		return sample{}, err
	}
	process, err := procfs.NewProc(l.proxy.PID)
	if err != nil {
		return sample{}, err
	}
	status, err := process.NewStatus()
	if err != nil {
		return sample{}, err
	}
	descriptors, err := process.FileDescriptorsLen()
	return sample{
		rss:         float64(status.VmRSS) / mib,
		peak:        float64(status.VmHWM) / mib,
		heap:        m.Value("go_memstats_heap_alloc_bytes") / mib,
		goroutines:  m.Value("go_goroutines"),
		descriptors: float64(descriptors),
		queued:      m.Value("proxy_requests_queued"),
	}, err
}

// watch takes samples until ctx ends.
func (l *lane) watch(ctx context.Context, begun time.Time) {
	ticker := time.NewTicker(sampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		s, err := l.look()
		if err != nil {
			if ctx.Err() == nil {
				l.problems.add("looking at the proxy: %v", err)
			}
			continue
		}
		s.at = time.Since(begun)
		l.mu.Lock()
		l.samples = append(l.samples, s)
		l.mu.Unlock()
	}
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

// eventually waits for ok, up to proxytest.Timeout, and returns what it was last.
func eventually(ok func() bool) bool {
	for deadline := time.Now().Add(proxytest.Timeout); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

// rest closes all connections and waits until the proxy holds no more than before the traffic.
func (l *lane) rest() {
	l.upstream.server.CloseClientConnections()
	var err error
	if !eventually(func() bool {
		l.after, err = l.look()
		return err == nil && l.after.goroutines <= l.before.goroutines && l.after.descriptors <= l.before.descriptors
	}) {
		l.problems.add("after the traffic the proxy has %v goroutines and %v descriptors, before it had %v and %v (%v)",
			l.after.goroutines, l.after.descriptors, l.before.goroutines, l.before.descriptors, err)
	}
	if l.after.peak > containerMemory && !l.options.race {
		l.problems.add("the proxy had %.1f MiB of memory, more than the %d of its container", l.after.peak, containerMemory)
	}
}

// lastStreams are under way when the proxy is told to end.
const lastStreams = 4

// end ends the proxy with streams under way, which it has to finish; how they ended is
// seen with all other requests.
func (l *lane) end() {
	var streams sync.WaitGroup
	for range lastStreams {
		p := l.next()
		for p.kind != eventStream || p.fault != noFault || p.pace*time.Duration(p.answer.size)/time.Duration(eventSize) < time.Second {
			p = l.next()
		}
		streams.Go(func() {
			c := &client{addr: l.proxy.Addr(), problems: &l.problems}
			defer c.hangUp()
			l.send(c, p)
		})
		if !eventually(func() bool { return l.upstream.seen(p.number) > 0 }) {
			l.problems.add("%v: it does not reach the upstream", p)
		}
	}
	defer streams.Wait()
	if err := l.proxy.Signal(syscall.SIGTERM); err != nil {
		l.problems.add("%v", err)
		return
	}
	code, err := l.proxy.Wait(proxytest.Timeout)
	if err != nil || code != 0 {
		l.problems.add("after SIGTERM the proxy ended with exit code %d (%v)", code, err)
	}
	if said := l.proxy.Stderr(); said != "" {
		l.problems.add("the proxy wrote to stderr: %.4000s", said)
	}
}
