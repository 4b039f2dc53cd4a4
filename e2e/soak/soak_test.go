// Package soak runs the released proxy for long under mixed traffic in which both sides do wrong at random, and checks every byte,
// every count and that nothing grows.
//
//	go -C e2e test -count=1 -v -timeout 0 -tags soak ./soak -for 30m
//	go -C e2e test -count=1 -v -timeout 0 -tags soak ./soak -for 30m -seed N    the requests of an earlier run
//
// Two proxies run at once, one before an HTTP/2 and one before an HTTP/1.1 upstream. What each request is, and what goes wrong with
// it, follows from the seed and the request's number, which stands in its path: client and upstream each know it, and each byte of
// the bodies. At the end, the proxy's log has to have exactly one line for each request, in which it ends as its plan allows, as the
// client saw it, and after as many attempts as the upstream saw; and the metrics have to be what these lines add up to. Memory,
// goroutines and descriptors are sampled, a line is fitted through the samples, and at rest nothing may be left of the traffic.
package soak

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

var (
	duration = flag.Duration("for", 30*time.Second, "length of the traffic, 10s at least: else there are too few samples for a line")
	seed     = flag.Uint64("seed", rand.Uint64(), "`number` that the requests follow from")
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

// A lane is a proxy with an upstream of its own and clients. There are two, since an upstream that offers HTTP/2 is never spoken to
// in HTTP/1.1.
type lane struct {
	*proxytest.Scene
	seed    uint64
	wrong   func(format string, args ...any) // is told what is wrong
	numbers atomic.Int64                     // of the newest request

	mu        sync.Mutex
	exchanges map[int]*exchange
}

// An exchange is what everyone saw of one request.
type exchange struct {
	client   result
	attempts int // that the upstream saw
	log      []logLine
}

// note notes something of the exchange with this number.
func (l *lane) note(number int, note func(*exchange)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.exchanges[number] == nil {
		l.exchanges[number] = new(exchange)
	}
	note(l.exchanges[number])
}

const (
	// clients there are of each lane.
	clients = 16
	// thinking is how long a client rests between two requests, on average: the machine is to be busy, but no attempt late for lack
	// of a processor.
	thinking = 150 * time.Millisecond
)

// run is the lane's life. What the scene does at its end belongs to it.
func (l *lane) run(protocol fakeanthropic.Protocol) {
	// Faults are short, and requests wait in line: a quarter of the clients for a place, and more than three bodies of unknown length
	// for memory.
	config := fmt.Sprintf("[proxy]\ntimeout_secs = %d\ntimeout_retries = 1\nmax_body_mb = %d\nbody_memory_mb = 24\nmax_connections = %d\n",
		int(timeout.Seconds()), maxBody/mib, clients*3/4)
	l.StartAPI(protocol, l, config, "GOMEMLIMIT=96MiB").Forget() // the limit is that of k8s/deployment.yaml

	sending, stop := context.WithTimeout(l.Context(), *duration)
	defer stop()
	busy, idle := context.WithCancel(l.Context())
	var running, watching sync.WaitGroup
	var stood []span
	watching.Go(func() { stood = stalls(busy) })
	var samples [len(quantities)][]float64
	watching.Go(func() { samples = l.sample(sending, stop) })
	for range clients {
		running.Go(func() { l.use(sending) })
	}
	running.Wait()
	idle()
	watching.Wait()

	if err := proxytest.Poll(func() string { // clients that left did not wait for the end
		if lines, _ := completed(l.Proxy.Logs()); len(lines) != int(l.numbers.Load()) {
			return fmt.Sprintf("the log has %d requests of %d", len(lines), l.numbers.Load())
		}
		return ""
	}); err != nil {
		l.Error(err)
	}
	l.judge(stood)
	for i, q := range quantities {
		trend, say := q.trend(samples[i]), l.Logf
		if trend.exceeds(q) {
			say = l.Errorf
		}
		say("%s: %.1f at most, grown by %.1f ± %.1f", q.name, trend.most, trend.grown, trend.err)
	}
}

// use is one client: it sends requests until ctx ends, and finishes the last.
func (l *lane) use(ctx context.Context) {
	c := &client{addr: l.Proxy.Addr()}
	defer c.hangUp(plan{})
	for ctx.Err() == nil {
		p := newPlan(l.seed, int(l.numbers.Add(1)))
		got, err := c.do(p)
		if err != nil {
			l.wrong("%v: %v", p, err)
		}
		l.note(p.number, func(x *exchange) { x.client = got })
		select {
		case <-time.After(time.Duration(rand.ExpFloat64() * float64(thinking))):
		case <-ctx.Done():
		}
	}
}

// lateShare is how many of a thousand requests may be late before the run is worth nothing. The race detector makes the proxy so slow
// that uploads of 10 MiB come too late on a busy machine that never stood still.
var lateShare = map[bool]int{false: 5, true: 30}

// judge checks how each request ended, and tells how many did how. The counters have to agree with the log at the scene's end.
func (l *lane) judge(stood []span) {
	lines, trouble := completed(l.Proxy.Logs())
	if len(trouble) > 0 {
		l.Errorf("the log tells of trouble:\n%s", strings.Join(trouble, "\n"))
	}
	for _, line := range lines {
		l.note(line.number, func(x *exchange) { x.log = append(x.log, line) })
		l.Expect(proxytest.Completed{Status: line.Status, Attempts: line.Attempts, ErrorType: line.code, Err: line.Error})
	}
	l.mu.Lock() // the upstream may still get what was given up
	defer l.mu.Unlock()
	ended, late := map[string]int{}, 0
	for number, x := range l.exchanges {
		p := newPlan(l.seed, number)
		wrong, isLate := judge(p, *x, proxytest.Raced() || x.client.near(stood))
		if len(wrong) > 0 {
			l.Errorf("%v: %s; %+v", p, strings.Join(wrong, "; "), *x)
		}
		if isLate {
			late++
		}
		for _, line := range x.log {
			ended[fmt.Sprintf("fault: %s: %d %s", p.fault, line.Status, line.code)]++
		}
	}
	if late*1000 > len(lines)*lateShare[proxytest.Raced()] {
		l.Errorf("%d of %d requests were late: the machine is too busy, or the proxy too slow", late, len(lines))
	}
	l.Logf("-for %v -seed %d: %d requests, %d late; the machine stood still %d times", *duration, l.seed, len(lines), late, len(stood))
	for _, how := range slices.Sorted(maps.Keys(ended)) {
		l.Logf("%6d × %s", ended[how], how)
	}
}
