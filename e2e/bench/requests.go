package main

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"
)

// exchange is what clients do over and over: a request and its answer.
type exchange struct {
	method     string
	path       string
	bodySize   int
	answerSize int64
	conns      int     // clients at once, each with a connection of its own
	rate       float64 // requests a second, at random times; 0: each client sends as soon as its last was answered
}

// lap is what all clients have done in one stretch of time.
type lap struct {
	latencies []time.Duration
	elapsed   time.Duration
	cpu       float64 // of the target, seconds; NaN for direct
}

// perSecond returns the number of requests in a second.
func (l lap) perSecond() float64 { return float64(len(l.latencies)) / l.elapsed.Seconds() }

// figures returns those of requestColumns.
func (l lap) figures() []float64 {
	return []float64{
		l.cpu * 1e6 / float64(len(l.latencies)), l.perSecond(),
		milliseconds(percentile(l.latencies, 50)), milliseconds(percentile(l.latencies, 99)),
	}
}

// measureRequests returns the figures of requestColumns.
func measureRequests(e exchange) runner {
	return func(ctx context.Context, t *target, d time.Duration) ([]float64, error) {
		l, err := repeat(ctx, t, e, d)
		if err != nil {
			return nil, err
		}
		return l.figures(), nil
	}
}

// measureTransfer returns the figures of transferColumns.
func measureTransfer(e exchange) runner {
	return func(ctx context.Context, t *target, d time.Duration) ([]float64, error) {
		l, err := repeat(ctx, t, e, d)
		if err != nil {
			return nil, err
		}
		megabytes := float64(max(int64(e.bodySize), e.answerSize)) / 1e6
		return []float64{megabytes * l.perSecond(), l.cpu * 1e3 / megabytes / float64(len(l.latencies))}, nil
	}
}

// repeat warms t up with e and then measures for d.
func repeat(ctx context.Context, t *target, e exchange, d time.Duration) (lap, error) {
	clients, err := connect(ctx, t, e.conns)
	defer func() {
		for _, c := range clients {
			c.conn.Close()
		}
	}()
	if err != nil {
		return lap{}, err
	}
	if _, err := runLap(t, clients, e, time.Duration(warmUp*float64(d))); err != nil {
		return lap{}, err
	}
	if ctx.Err() != nil {
		return lap{}, context.Cause(ctx)
	}
	return runLap(t, clients, e, d)
}

// connect opens n connections, some at a time. Those that it has opened are
// returned also when another fails.
func connect(ctx context.Context, t *target, n int) ([]*client, error) {
	const atOnce = 32
	var (
		mu      sync.Mutex
		clients = make([]*client, 0, n)
		failed  error
		wg      sync.WaitGroup
		slots   = make(chan struct{}, atOnce)
	)
	for range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			c, err := t.dial(ctx)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = err
				return
			}
			clients = append(clients, c)
		})
	}
	wg.Wait()
	return clients, failed
}

// runLap has all clients send requests for d. All begun requests count and are
// waited for.
func runLap(t *target, clients []*client, e exchange, d time.Duration) (lap, error) {
	request := t.request(e.method, e.path, e.bodySize)
	before, err := t.cpu()
	if err != nil {
		return lap{}, err
	}
	latencies := make([][]time.Duration, len(clients))
	failures := make([]error, len(clients))
	begun := time.Now()
	work := func(c *client) ([]time.Duration, error) { return c.loop(request, e.answerSize, begun.Add(d)) }
	if e.rate > 0 {
		work = offer(request, e, d)
	}
	var wg sync.WaitGroup
	for i, c := range clients {
		wg.Go(func() { latencies[i], failures[i] = work(c) })
	}
	wg.Wait()
	l := lap{elapsed: time.Since(begun)}
	after, err := t.cpu()
	if err := errors.Join(append(failures, err)...); err != nil {
		return lap{}, err
	}
	l.cpu = after - before
	for _, some := range latencies {
		l.latencies = append(l.latencies, some...)
	}
	return l, nil
}

// loop does requests until end, at least one, and returns how long each took.
func (c *client) loop(request []byte, answerSize int64, end time.Time) ([]time.Duration, error) {
	if err := c.expect(time.Until(end) + patience); err != nil {
		return nil, err
	}
	var took []time.Duration
	for begun := time.Now(); ; {
		if err := c.do(request, answerSize); err != nil {
			return nil, err
		}
		now := time.Now()
		took = append(took, now.Sub(begun))
		if begun = now; !now.Before(end) {
			return took, nil
		}
	}
}

// small is what most of the work is measured with.
func small(conns int) exchange {
	return exchange{method: http.MethodPost, path: smallPath, bodySize: 2 << 10, answerSize: smallAnswerSize, conns: conns}
}

// upload is a large request.
func upload(size int) exchange {
	return exchange{method: http.MethodPost, path: smallPath, bodySize: size, answerSize: smallAnswerSize, conns: largeConns}
}

// download is a large answer.
func download() exchange {
	return exchange{method: http.MethodGet, path: largePath, answerSize: largeAnswerSize, conns: largeConns}
}

// largeConns is how many large transfers there are at once. The proxy buffers
// requests, and four of 10 MiB fit its default budget.
const largeConns = 4
