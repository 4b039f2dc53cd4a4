package main

import (
	"fmt"
	"math"
	"slices"
	"time"

	"gonum.org/v1/gonum/stat"
)

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

func mean(values []float64) float64 { return stat.Mean(values, nil) }

const (
	// warmUp is the part of the run whose samples are not looked at.
	warmUp = 0.2
	// fewest samples make a line: those of the shortest run, but for one or two that a
	// busy machine is late with.
	fewest = 6
	// blocks is how many figures the samples of a run are made into before a line is
	// fitted. The standard error holds for figures that do not depend on each other;
	// those of successive seconds do, since the memory, say, that one upload took is
	// given back only some collections later. Those of a sixteenth of the run hardly do.
	blocks = 16
)

// A trend is a straight line through samples, by least squares.
type trend struct {
	slope float64 // per hour
	err   float64 // the slope's standard error
	span  time.Duration
}

// trend fits a line through the quantity's samples; ok is false if the run was too
// short for that.
func (q quantity) trend(samples []sample, run time.Duration) (t trend, ok bool) {
	from := max(q.settles, time.Duration(warmUp*float64(run)))
	samples = slices.DeleteFunc(slices.Clone(samples), func(s sample) bool { return s.at < from })
	if len(samples) < fewest {
		return trend{}, false
	}
	n := min(blocks, len(samples))
	x, y := make([]float64, n), make([]float64, n)
	for i := range n {
		var hours, values []float64
		for _, s := range samples[i*len(samples)/n : (i+1)*len(samples)/n] {
			hours, values = append(hours, s.at.Hours()), append(values, q.of(s))
		}
		x[i], y[i] = mean(hours), q.block(values)
	}
	_, slope := stat.LinearRegression(x, y, nil, false)
	unexplained := stat.Variance(y, nil)/stat.Variance(x, nil) - slope*slope // by rounding, it may be less than none
	err := math.Sqrt(max(0, unexplained) / float64(n-2))
	return trend{slope: slope, err: err, span: samples[len(samples)-1].at - samples[0].at}, true
}

// grown is by how much the value has grown over the samples for certain: what is
// left of the slope less three standard errors.
func (t trend) grown() float64 { return max(0, t.slope-3*t.err) * t.span.Hours() }

func (t trend) String() string { return fmt.Sprintf("%+.2f ± %.2f per hour", t.slope, t.err) }

// checkFlat looks for what grows. The race detector's own memory may.
func checkFlat(o options, samples []sample, problems *problems) {
	for _, q := range quantities {
		t, ok := q.trend(samples, o.duration)
		switch {
		case !ok && q.settles == 0:
			problems.add("%s: %d samples are too few for a line", q.name, len(samples))
		case t.grown() > q.tolerated && !(o.race && q.name == rss):
			problems.add("%s: growth of %v, by %.1f over %v for certain", q.name, t, t.grown(), t.span.Round(time.Second))
		}
	}
}
