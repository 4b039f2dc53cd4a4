package soak

import (
	"context"
	"math"
	"net/http"
	"slices"
	"time"

	"gonum.org/v1/gonum/stat"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A quantity is something that the proxy holds, of which there is a sample every second.
type quantity struct {
	name    string
	metric  string
	unit    float64
	block   func([]float64) float64 // of samples, to the one figure that a line is fitted through
	settles int                     // samples, during which it may grow at the start
	most    float64                 // there may be: what the container of k8s/deployment.yaml has
}

// quantities have to stay flat.
//
// Resident memory fills with garbage until GOMEMLIMIT, as it may: this traffic takes up to two minutes for that. Afterwards a leak
// would hide there, which shows in what is left of the heap after a collection, the least of many samples. Either may come to hold
// one body more of the largest size. All else follows the traffic, which is the same throughout: of half an hour's 50,000 requests,
// one in 5,000 that leaves something behind is too much.
var quantities = [...]quantity{
	{"RSS, MiB", residentMemory, mib, mean, 120, 128},
	{"heap after collections, MiB", "go_memstats_heap_alloc_bytes", mib, slices.Min[[]float64], 120, 128},
	{"goroutines", "go_goroutines", 1, mean, 0, math.Inf(1)},
	{"descriptors", "process_open_fds", 1, mean, 0, math.Inf(1)},
}

const residentMemory = "process_resident_memory_bytes"

func mean(values []float64) float64 { return stat.Mean(values, nil) }

// sample takes samples of each quantity until ctx ends, which it cancels if the proxy does.
func (l *lane) sample(ctx context.Context, cancel func()) (samples [len(quantities)][]float64) {
	ticker := time.NewTicker(time.Second)
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
		for i, q := range quantities {
			if !m.Has(q.metric) {
				l.Errorf("/metrics has no %s", q.metric)
			}
			samples[i] = append(samples[i], m.Value(q.metric)/q.unit)
		}
	}
}

const (
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
	grown float64 // by the line
	err   float64 // the standard error of that: infinite if there are too few samples
}

// trend fits a line through samples of the quantity, but for the first fifth.
func (q quantity) trend(samples []float64) (t trend) {
	t.most = slices.Max(append([]float64{0}, samples...))
	settled := samples[min(max(q.settles, len(samples)/5), len(samples)):]
	if len(settled) < fewest {
		t.err = math.Inf(1)
		return t
	}
	var x, y []float64
	for block := range slices.Chunk(settled, (len(settled)+blocks-1)/blocks) {
		x, y = append(x, float64(len(x))), append(y, q.block(block))
	}
	_, slope := stat.LinearRegression(x, y, nil, false)
	unexplained := stat.Variance(y, nil)/stat.Variance(x, nil) - slope*slope // by rounding, it may be less than none
	last := x[len(x)-1]
	t.grown, t.err = slope*last, math.Sqrt(max(0, unexplained)/(last-1))*last
	return t
}

// exceeds reports whether there is too much of the quantity, or will be. The race detector's own memory may grow.
func (t trend) exceeds(q quantity) bool {
	if proxytest.Raced() && q.metric == residentMemory {
		return false
	}
	return t.grown-3*t.err > tolerated || t.most > q.most || math.IsInf(t.err, 1) && q.settles == 0
}
