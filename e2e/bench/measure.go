package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"gonum.org/v1/gonum/stat"
)

const (
	warmUp  = 0.4                    // how long a contestant works before it is measured, as a fraction of the duration
	catchUp = 500 * time.Millisecond // at least, after the last handshake: the first clients have waited for the processor
)

// run has all clients of w at work until it has measured them for d, and each has got all that it asked for in that time.
func (t *target) run(ctx context.Context, w workload, d time.Duration) (figures, error) {
	limit := time.Minute + 5*d
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s hangs: not done after %v", w.name, limit))
	defer cancel()
	working, busy := errgroup.WithContext(ctx) // a client that fails ends the measurement
	var over atomic.Int64                      // when the measured time is over, by clock
	over.Store(math.MaxInt64)
	var opening errgroup.Group
	opening.SetLimit(32)
	due := schedule(t.fullRate * w.offered / 100)
	samples := make([][]sample, w.conns)
	for i := range w.conns {
		opening.Go(func() error {
			conn, err := t.dial(busy)
			if err != nil {
				return err
			}
			next, err := w.open(client{conn, t, float64(i) / float64(w.conns), due})
			if err != nil {
				return err
			}
			working.Go(func() error {
				for {
					s, err := next()
					if err != nil || s.begun >= time.Duration(over.Load()) {
						return err
					}
					samples[i] = append(samples[i], s)
				}
			})
			return nil
		})
	}
	err := opening.Wait()
	var seen window
	if err == nil {
		seen, err = t.watch(busy, d)
	}
	if err = cmp.Or(context.Cause(busy), err); err != nil {
		return nil, err
	}
	over.Store(int64(seen.to))
	if err := working.Wait(); err != nil {
		return nil, cmp.Or(context.Cause(ctx), err)
	}
	return seen.figures(w, t.idle[idlePSS], slices.Concat(samples...))
}

// A window is the measured time, by clock, and what was used in it.
type window struct {
	from, to   time.Duration
	cpu, pssMB float64 // seconds, and at the end
}

// watch waits for the work to settle, and then for d.
func (t *target) watch(ctx context.Context, d time.Duration) (w window, err error) {
	if err := pause(ctx, max(catchUp, time.Duration(warmUp*float64(d)))); err != nil {
		return w, err
	}
	w.from = time.Since(clock)
	before, _, _, errBefore := t.usage()
	if err := pause(ctx, d); err != nil {
		return w, err
	}
	w.to = time.Since(clock)
	after, _, pss, errAfter := t.usage()
	w.cpu, w.pssMB = after-before, pss
	return w, errors.Join(errBefore, errAfter)
}

// usage returns the processor time in seconds that t has used so far, and the memory in MB that it holds.
func (t *target) usage() (cpu, rss, pss float64, err error) {
	if t.process == nil {
		return math.NaN(), math.NaN(), math.NaN(), nil
	}
	used, errCPU := t.process.CPU()
	resident, proportional, errMemory := t.process.Memory()
	return used.Seconds(), float64(resident) / 1e6, float64(proportional) / 1e6, errors.Join(errCPU, errMemory)
}

// figures returns those of the samples that were begun in the window, of a process that holds idle MB without any work.
func (w window) figures(work workload, idle float64, samples []sample) (figures, error) {
	var latencies []float64
	for _, s := range samples {
		if s.begun >= w.from && s.begun < w.to {
			latencies = append(latencies, milliseconds(s.took))
		}
	}
	if latencies == nil {
		return nil, errors.New("nothing was answered in time: this machine is too busy to measure")
	}
	slices.Sort(latencies)
	n, elapsed := float64(len(latencies)), (w.to - w.from).Seconds()
	return figures{
		cpuEach:     w.cpu * 1e6 / n,
		perSecond:   n / elapsed,
		megabytes:   n / elapsed * work.megabytes,
		p50:         stat.Quantile(0.5, stat.Empirical, latencies, nil),
		p99:         stat.Quantile(0.99, stat.Empirical, latencies, nil),
		kbPerStream: (w.pssMB - idle) * 1e3 / float64(work.conns),
		mibInAll:    w.pssMB * 1e6 / (1 << 20),
	}, nil
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
