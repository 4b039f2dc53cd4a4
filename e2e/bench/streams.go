package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	catchUp    = 500 * time.Millisecond // at least, after the last handshake: the first streams have waited for the processor
	latecomers = 500 * time.Millisecond // how long after the measured time its last events may arrive
)

// An arrival is that of an event, by clock.
type arrival struct{ sent, at time.Duration }

// streams measures n event streams; it returns the figures of streamColumns but for those that are added to direct's.
func streams(n int) runner {
	return func(ctx context.Context, t *target, d time.Duration) (figures, error) {
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		readers, ctx := errgroup.WithContext(ctx) // a stream that ends early ends the measurement
		clients, err := t.connect(ctx, n)
		if err != nil {
			return nil, err
		}
		arrivals := make([][]arrival, n)
		err = each(n, func(i int) error {
			// Streams are out of step with each other: a phase is when the first event is due.
			path := fmt.Sprintf("%s?beta=true&phase=%dns", streamPath, eventInterval*time.Duration(i)/time.Duration(n))
			body, err := send(clients[i], t.request("POST", path, 2<<10))
			if err != nil {
				return err
			}
			readers.Go(func() (err error) {
				if arrivals[i], err = readEvents(body); ctx.Err() != nil {
					return nil
				}
				return fmt.Errorf("reading a stream: %w", err)
			})
			return nil
		})
		var w window
		if err == nil {
			w, err = t.watch(ctx, d)
		}
		stop()
		if err := cmp.Or(readers.Wait(), err); err != nil {
			return nil, err
		}
		return w.figures(t.idle[idlePSS]*1e6, arrivals)
	}
}

// readEvents reads until there is an error; streams have no end.
func readEvents(body io.Reader) ([]arrival, error) {
	var all []arrival
	lines := bufio.NewReaderSize(body, 1<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if err != nil {
			return all, err
		}
		if sent, ok := parseEvent(line); ok {
			all = append(all, arrival{sent, time.Since(clock)})
		}
	}
}

// A window is the measured time, by clock, and what was used in it: the events that were sent within count.
type window struct {
	from, to time.Duration
	cpu, pss float64 // seconds, bytes
}

// watch waits for streams to settle, and then for d and the events sent until then.
func (t *target) watch(ctx context.Context, d time.Duration) (w window, err error) {
	if err := pause(ctx, max(catchUp, time.Duration(warmUp*float64(d)))); err != nil {
		return w, err
	}
	before, errBefore := t.cpu()
	w.from = time.Since(clock)
	if err := pause(ctx, d); err != nil {
		return w, err
	}
	w.to = time.Since(clock)
	after, errAfter := t.cpu()
	w.cpu = after - before
	_, w.pss, err = t.memory()
	return w, errors.Join(errBefore, errAfter, err, pause(ctx, latecomers))
}

// figures returns those of streams that have had these arrivals, of a process that held idle bytes without any.
func (w window) figures(idle float64, arrivals [][]arrival) (figures, error) {
	latencies := make([][]float64, len(arrivals))
	for i, ofStream := range arrivals {
		for _, a := range ofStream {
			if a.sent >= w.from && a.sent < w.to {
				latencies[i] = append(latencies[i], milliseconds(a.at-a.sent))
			}
		}
	}
	n := float64(len(arrivals))
	due := n * (w.to - w.from).Seconds() / eventInterval.Seconds()
	events, measured := summary(latencies)
	if events == 0 {
		return nil, fmt.Errorf("none of about %.0f events arrived in time: this machine is too busy to measure", due)
	}
	measured[cpuPerEvent], measured[arrived] = w.cpu*1e6/events, events/due*100
	measured[kbPerStream], measured[mibInAll] = (w.pss-idle)/1e3/n, w.pss/(1<<20)
	return measured, nil
}
