package main

import (
	"anthropic-oauth-proxy/e2e/proxytest"
	"context"
	"fmt"
	"math"
	"os"
	"slices"
	"time"

	"github.com/prometheus/procfs"
	"gonum.org/v1/gonum/stat"
)

// quantities are what the proxy holds, which has to stay flat.
//
// Resident memory fills with garbage until GOMEMLIMIT, as it may: this traffic takes up to two minutes for that. Afterwards a leak
// would hide there, which shows in what is left of the heap after a collection, the least of many samples. Either may come to hold
// one body more of the largest size. All else follows the traffic, which is the same throughout: of half an hour's 50,000 requests,
// one in 5,000 that leaves something behind is too much.
var quantities = [...]struct {
	name      string
	metric    string
	unit      float64
	block     func([]float64) float64 // of samples, to the one figure that a line is fitted through
	settles   time.Duration           // it may grow for so long at the start
	tolerated float64                 // it may grow by so much afterwards, for certain
	rests     bool                    // without traffic there is no more than before
}{
	{"RSS, MiB", "process_resident_memory_bytes", mib, mean, 2 * time.Minute, 10, false},
	{"heap after collections, MiB", "go_memstats_heap_alloc_bytes", mib, slices.Min[[]float64], 2 * time.Minute, 10, false},
	{"goroutines", "go_goroutines", 1, mean, 0, 10, true},
	{"descriptors", "process_open_fds", 1, mean, 0, 10, true},
	{"requests in line", "proxy_requests_queued", 1, mean, 0, 10, true},
}

func mean(values []float64) float64 { return stat.Mean(values, nil) }

// A sample is how much there was of each quantity at one time.
type sample struct {
	at     time.Duration // after the traffic began
	values [len(quantities)]float64
}

// look takes a sample.
func (l *lane) look() (s sample, err error) {
	m, err := l.proxy.Metrics()
	if err != nil {
		return s, err
	}
	for i, q := range quantities {
		if !m.Has(q.metric) {
			return s, fmt.Errorf("/metrics has no %s", q.metric)
		}
		s.values[i] = m.Value(q.metric) / q.unit
	}
	return s, nil
}

const (
	sampleEvery = time.Second
	tellEvery   = 10 // samples, it says how it goes on
)

// watch takes samples until ctx ends, which it cancels if the proxy does.
func (l *lane) watch(ctx context.Context, cancel func()) {
	begun := time.Now()
	ticker := time.NewTicker(sampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.proxy.Done():
			l.problems.add("the proxy ended under load; stderr: %.4000s", l.proxy.Stderr())
			cancel()
			return
		case <-ticker.C:
		}
		s, err := l.look()
		if err != nil {
			l.problems.add("looking at the proxy: %v", err)
			continue
		}
		s.at = time.Since(begun)
		if l.samples = append(l.samples, s); len(l.samples)%tellEvery == 0 {
			fmt.Fprintf(os.Stderr, "soak: %v of %v, %s: %d requests, %.0f MiB, %.0f goroutines, %.0f descriptors; %d wrong\n",
				s.at.Round(time.Second), l.options.duration, l.name, l.numbers.Load(), s.values[0], s.values[2], s.values[3], len(l.problems.all()))
		}
	}
}

const (
	// warmUp is the part of the run whose samples are not looked at.
	warmUp = 0.2
	// fewest samples make a line: those of the shortest run, but for one or two that a busy machine is late with.
	fewest = 6
	// blocks is how many figures the samples of a run are made into before a line is fitted. The standard error holds for figures that
	// do not depend on each other; those of successive seconds do, since the memory, say, that one upload took is given back only some
	// collections later. Those of a sixteenth of the run hardly do.
	blocks = 16
)

// A trend is a straight line through samples, by least squares.
type trend struct {
	slope float64 // per hour
	err   float64 // the slope's standard error
	grown float64 // over the samples, for certain: what is left of the slope less three standard errors
}

// fitTrend fits a line through the samples of a quantity; ok is false if the run was too short for that.
func fitTrend(quantity int, samples []sample, run time.Duration) (t trend, ok bool) {
	from := max(quantities[quantity].settles, time.Duration(warmUp*float64(run)))
	samples = slices.DeleteFunc(slices.Clone(samples), func(s sample) bool { return s.at < from })
	if len(samples) < fewest {
		return trend{}, false
	}
	n := min(blocks, len(samples))
	var x, y []float64
	for block := range n {
		var hours, values []float64
		for _, s := range samples[block*len(samples)/n : (block+1)*len(samples)/n] {
			hours, values = append(hours, s.at.Hours()), append(values, s.values[quantity])
		}
		x, y = append(x, mean(hours)), append(y, quantities[quantity].block(values))
	}
	_, slope := stat.LinearRegression(x, y, nil, false)
	unexplained := stat.Variance(y, nil)/stat.Variance(x, nil) - slope*slope // by rounding, it may be less than none
	err := math.Sqrt(max(0, unexplained) / float64(n-2))
	return trend{slope, err, max(0, slope-3*err) * (samples[len(samples)-1].at - samples[0].at).Hours()}, true
}

func (t trend) String() string {
	return fmt.Sprintf("%+.2f ± %.2f per hour: by %.1f for certain", t.slope, t.err, t.grown)
}

// checkFlat looks for what grows. The race detector's own memory may.
func checkFlat(o options, samples []sample, problems *problems) {
	for i, q := range quantities {
		t, ok := fitTrend(i, samples, o.duration)
		switch {
		case !ok && q.settles == 0:
			problems.add("%s: %d samples are too few for a line", q.name, len(samples))
		case t.grown > q.tolerated && !(o.race && q.metric == "process_resident_memory_bytes"):
			problems.add("growth of %s: %v", q.name, t)
		}
	}
}

// containerMemory is what the container of k8s/deployment.yaml has, in MiB.
const containerMemory = 128

// checkRest closes all connections and waits until the proxy holds no more than before the traffic.
func (l *lane) checkRest() {
	l.upstream.HangUp()
	if err := proxytest.Poll(func() string {
		now, err := l.look()
		if err != nil {
			return err.Error()
		}
		for i, q := range quantities {
			if q.rests && now.values[i] > l.before.values[i] {
				return fmt.Sprintf("%v %s, which were %v", now.values[i], q.name, l.before.values[i])
			}
		}
		return ""
	}); err != nil {
		l.problems.add("after the traffic: %v", err)
	}
	process, err := procfs.NewProc(l.proxy.PID)
	if err == nil {
		var status procfs.ProcStatus
		status, err = process.NewStatus()
		l.peak = float64(status.VmHWM) / mib
	}
	if err != nil || l.peak > containerMemory && !l.options.race {
		l.problems.add("the proxy had %.1f MiB of memory, of the %d of its container (%v)", l.peak, containerMemory, err)
	}
}
