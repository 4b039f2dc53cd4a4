package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// catchUp is the least that streams are given after the last one was opened: the
// first ones have waited for the processor while others shook hands.
const catchUp = 500 * time.Millisecond

// latecomers is how long after the measured time its last events may arrive.
const latecomers = 500 * time.Millisecond

// window is the time that is measured: events sent within it count. Its ends are
// times after clock, and set when they have come.
type window struct{ from, to atomic.Int64 }

func (w *window) has(sent time.Duration) bool {
	return int64(sent) >= w.from.Load() && int64(sent) < w.to.Load()
}

// measureStreams returns the figures of streamColumns for n event streams.
func measureStreams(n int) runner {
	return func(ctx context.Context, t *target, d time.Duration) ([]float64, error) {
		s, err := openStreams(ctx, t, n)
		defer s.close()
		if err != nil {
			return nil, err
		}
		return s.measure(ctx, d)
	}
}

// streams are event streams that are being read.
type streams struct {
	target  *target
	window  window
	clients []*client
	wg      sync.WaitGroup

	mu        sync.Mutex
	closing   bool
	latencies []time.Duration // from sending to arrival, of all events in the window
	failed    error           // of a stream that ended before close
}

// openStreams starts n streams, some at a time, and reads them. What it returns
// has to be closed, also after an error.
func openStreams(ctx context.Context, t *target, n int) (*streams, error) {
	s := &streams{target: t}
	s.window.from.Store(math.MaxInt64)
	s.window.to.Store(math.MaxInt64)
	var err error
	if s.clients, err = connect(ctx, t, n); err != nil {
		return s, err
	}
	const atOnce = 64
	var opening sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for i, c := range s.clients {
		slots <- struct{}{}
		opening.Add(1)
		opened := func() { <-slots; opening.Done() }
		s.wg.Go(func() { s.follow(c, float64(i)/float64(n), opened) })
	}
	opening.Wait()
	return s, s.failure()
}

// follow asks for a stream and reads it to its end.
func (s *streams) follow(c *client, phase float64, opened func()) {
	resp, err := s.ask(c, phase)
	opened()
	if err != nil {
		s.fail(err)
		return
	}
	latencies, err := s.read(resp)
	s.mu.Lock()
	s.latencies = append(s.latencies, latencies...)
	s.mu.Unlock()
	s.fail(err)
}

func (s *streams) ask(c *client, phase float64) (*http.Response, error) {
	if err := c.expect(streamLimit); err != nil {
		return nil, err
	}
	request := s.target.request(http.MethodPost, streamPath, 2<<10, fmt.Sprintf("%s: %.4f", phaseHeader, phase))
	return c.send(request)
}

// read reads events. It always ends with an error, that of close in the ordinary
// case.
func (s *streams) read(resp *http.Response) ([]time.Duration, error) {
	var latencies []time.Duration
	lines := bufio.NewReaderSize(resp.Body, 1<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return latencies, fmt.Errorf("reading a stream: %w", err)
		}
		if sent, ok := parseEvent(line); ok && s.window.has(sent) {
			latencies = append(latencies, time.Since(clock)-sent)
		}
	}
}

func (s *streams) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing && s.failed == nil {
		s.failed = err
	}
}

func (s *streams) failure() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failed
}

// measure waits for the streams to settle, measures for d and closes them.
func (s *streams) measure(ctx context.Context, d time.Duration) ([]float64, error) {
	if err := pause(ctx, max(catchUp, time.Duration(warmUp*float64(d)))); err != nil {
		return nil, err
	}
	before, err := s.target.cpu()
	if err != nil {
		return nil, err
	}
	from := time.Since(clock)
	s.window.from.Store(int64(from))
	if err := pause(ctx, d); err != nil {
		return nil, err
	}
	to := time.Since(clock)
	s.window.to.Store(int64(to))
	after, errCPU := s.target.cpu()
	held, errMemory := s.target.memory()
	errPause := pause(ctx, latecomers)
	s.close()
	if err := errors.Join(s.failure(), errCPU, errMemory, errPause); err != nil {
		return nil, err
	}
	events, due := len(s.latencies), float64(len(s.clients))*(to-from).Seconds()/eventInterval.Seconds()
	if events == 0 {
		return nil, fmt.Errorf("none of about %.0f events arrived in time: this machine is too busy to measure", due)
	}
	return []float64{
		(after - before) * 1e6 / float64(events), float64(events) / due * 100,
		milliseconds(percentile(s.latencies, 50)), milliseconds(percentile(s.latencies, 99)),
		math.NaN(), math.NaN(), // added to direct, known once that was measured
		(held.pss - s.target.idle.pss) / 1000 / float64(len(s.clients)), held.pss / (1 << 20),
	}, nil
}

// close ends all streams and waits until they are read. It may be called twice.
func (s *streams) close() {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	for _, c := range s.clients {
		c.conn.Close()
	}
	s.wg.Wait()
}

// pause waits for d, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// percentile returns the smallest value that at least p percent of the values do
// not exceed, 0 if there are none. It sorts them.
func percentile(values []time.Duration, p float64) time.Duration {
	if len(values) == 0 {
		return 0
	}
	slices.Sort(values)
	rank := int(math.Ceil(p / 100 * float64(len(values))))
	return values[max(rank, 1)-1]
}
