package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A sample is what a proxy holds at one time.
type sample struct {
	at          time.Duration // after the traffic began
	rss         float64       // MiB
	heap        float64       // MiB, garbage included
	goroutines  float64
	descriptors float64
	queued      float64 // requests in line for a place or for memory
}

// sampleEvery is the time between two samples.
const sampleEvery = time.Second

// takeSample looks at the proxy's metrics and at its process.
func takeSample(p *proxytest.Proxy) (sample, error) {
	m, err := p.Metrics()
	if err != nil {
		return sample{}, err
	}
	resident, err := p.RSS()
	if err != nil {
		return sample{}, err
	}
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID))
	if err != nil {
		return sample{}, fmt.Errorf("reading the proxy's descriptors: %w", err)
	}
	return sample{
		rss:         float64(resident) / mib,
		heap:        m.Value("go_memstats_heap_alloc_bytes") / mib,
		goroutines:  m.Value("go_goroutines"),
		descriptors: float64(len(descriptors)),
		queued:      m.Value("proxy_requests_queued"),
	}, nil
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
		s, err := takeSample(l.proxy)
		if err != nil {
			if ctx.Err() == nil {
				l.problems.add("%v", err)
			}
			continue
		}
		s.at = time.Since(begun)
		l.mu.Lock()
		l.samples = append(l.samples, s)
		l.mu.Unlock()
	}
}

// peakRSS returns the most memory that the process has had, in MiB.
func peakRSS(pid int) (float64, error) {
	status, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("reading the proxy's peak memory: %w", err)
	}
	defer status.Close()
	for lines := bufio.NewScanner(status); lines.Scan(); {
		if value, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kib, err := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(value, "kB")), 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("reading the proxy's peak memory: no VmHWM in its status")
}

// A quantity is what has to stay flat.
type quantity struct {
	name      string
	of        func(sample) float64
	block     func([]float64) float64 // of samples, to the one figure that a line is fitted through
	settles   time.Duration           // it may grow for so long at the start
	tolerated float64                 // it may grow by so much afterwards, for certain
}

// rss is the name of the process' resident memory.
const rss = "RSS, MiB"

// quantities are those that are sampled.
//
// Resident memory fills with garbage until GOMEMLIMIT, as it may: this traffic takes
// up to two minutes for that. Afterwards a leak would hide there, which shows in what
// is left of the heap after a collection, the least of many samples. Either may
// come to hold one body more of the largest size. Goroutines and descriptors follow
// the traffic, which is the same throughout: of half an hour's 50,000 requests, one
// in 5,000 that leaves one behind is too much.
var quantities = []quantity{
	{rss, func(s sample) float64 { return s.rss }, mean, 2 * time.Minute, 10},
	{"heap after collections, MiB", func(s sample) float64 { return s.heap }, slices.Min[[]float64], 2 * time.Minute, 10},
	{"goroutines", func(s sample) float64 { return s.goroutines }, mean, 0, 10},
	{"descriptors", func(s sample) float64 { return s.descriptors }, mean, 0, 10},
}

// warmUp is the part of the run whose samples are not looked at.
const warmUp = 0.2

// trend fits a line through the quantity's samples; ok is false if the run was too
// short for that.
func (q quantity) trend(samples []sample, run time.Duration) (t trend, ok bool) {
	from := max(q.settles, time.Duration(warmUp*float64(run)))
	var at []time.Duration
	var values []float64
	for _, s := range samples {
		if s.at >= from {
			at, values = append(at, s.at), append(values, q.of(s))
		}
	}
	if len(at) < fewest {
		return trend{}, false
	}
	return fitTrend(at, values, q.block), true
}

// fewest samples make a line: those of the shortest run, but for one or two that a
// busy machine is late with.
const fewest = 6
