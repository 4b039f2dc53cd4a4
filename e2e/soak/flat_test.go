package soak

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"slices"
	"time"

	"gonum.org/v1/gonum/stat"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// quantities are what the proxy holds, which has to stay flat.
//
// Resident memory fills with garbage until GOMEMLIMIT, as it may: this traffic takes up to two minutes for that. Afterwards a leak
// would hide there, which shows in what is left of the heap after a collection, the least of many samples. Either may come to hold
// one body more of the largest size. All else follows the traffic, which is the same throughout: of half an hour's 50,000 requests,
// one in 5,000 that leaves something behind is too much.
var quantities = [...]struct {
	name    string
	metric  string
	unit    float64
	block   func([]float64) float64 // of samples, to the one figure that a line is fitted through
	settles time.Duration           // it may grow for so long at the start
	most    float64                 // there may be: what the container of k8s/deployment.yaml has
}{
	{"RSS, MiB", residentMemory, mib, mean, 2 * time.Minute, 128},
	{"heap after collections, MiB", "go_memstats_heap_alloc_bytes", mib, slices.Min[[]float64], 2 * time.Minute, 128},
	{"goroutines", "go_goroutines", 1, mean, 0, math.Inf(1)},
	{"descriptors", "process_open_fds", 1, mean, 0, math.Inf(1)},
}

const residentMemory = "process_resident_memory_bytes"

func mean(values []float64) float64 { return stat.Mean(values, nil) }

// A sample is how much there was of each quantity at one time.
type sample struct {
	at     time.Duration // after the traffic began
	values [len(quantities)]float64
}

const sampleEvery = time.Second

// sample takes samples until ctx ends, which it cancels if the proxy does.
func (l *lane) sample(ctx context.Context, cancel func()) (samples []sample) {
	begun, ticker := time.Now(), time.NewTicker(sampleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return samples
		case <-l.Proxy.Done():
			l.Error("the proxy ended under load")
			cancel()
			return samples
		case <-ticker.C:
		}
		m, err := l.Proxy.Metrics()
		if status, body, healthErr := l.Proxy.Health(); err != nil || healthErr != nil || status != http.StatusOK {
			l.Errorf("looking at the proxy: %v; /health: status %d, %s, %v", err, status, body, healthErr)
			continue
		}
		s := sample{at: time.Since(begun)}
		for i, q := range quantities {
			if !m.Has(q.metric) {
				l.Errorf("/metrics has no %s", q.metric)
			}
			s.values[i] = m.Value(q.metric) / q.unit
		}
		samples = append(samples, s)
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
	// tolerated is how much each quantity may grow, for certain, once it has settled.
	tolerated = 10
)

// A trend is a straight line through samples, by least squares.
type trend struct {
	most  float64 // of all samples
	slope float64 // per hour
	err   float64 // the slope's standard error
	grown float64 // over the samples, for certain: what is left of the slope less three standard errors
	short bool    // the run was too short for a line
}

// fitTrend fits a line through the samples of a quantity.
func fitTrend(quantity int, samples []sample, run time.Duration) (t trend) {
	q := quantities[quantity]
	var settled []sample
	for _, s := range samples {
		t.most = max(t.most, s.values[quantity])
		if s.at >= max(q.settles, time.Duration(warmUp*float64(run))) {
			settled = append(settled, s)
		}
	}
	if t.short = len(settled) < fewest; t.short {
		return t
	}
	var x, y []float64
	n := min(blocks, len(settled))
	for block := range n {
		var hours, values []float64
		for _, s := range settled[block*len(settled)/n : (block+1)*len(settled)/n] {
			hours, values = append(hours, s.at.Hours()), append(values, s.values[quantity])
		}
		x, y = append(x, mean(hours)), append(y, q.block(values))
	}
	_, t.slope = stat.LinearRegression(x, y, nil, false)
	unexplained := stat.Variance(y, nil)/stat.Variance(x, nil) - t.slope*t.slope // by rounding, it may be less than none
	t.err = math.Sqrt(max(0, unexplained) / float64(n-2))
	t.grown = max(0, t.slope-3*t.err) * (settled[len(settled)-1].at - settled[0].at).Hours()
	return t
}

func (t trend) String() string {
	if t.short {
		return fmt.Sprintf("%.1f at most, too short a run to tell a trend", t.most)
	}
	return fmt.Sprintf("%.1f at most, %+.2f ± %.2f per hour: by %.1f for certain", t.most, t.slope, t.err, t.grown)
}

// wrong reports whether there is too much of the quantity, or will be. The race detector's own memory may grow.
func (t trend) wrong(quantity int) bool {
	q := quantities[quantity]
	if proxytest.Raced() && q.metric == residentMemory {
		return false
	}
	return t.grown > tolerated || t.most > q.most || t.short && q.settles == 0
}
