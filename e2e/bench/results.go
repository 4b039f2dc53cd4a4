package main

import (
	"math"
	"slices"
)

// results are all figures of a run.
type results struct {
	works       []workload
	contestants []string
	samples     map[key][][]float64 // per measurement, in order: a figure for each column
	others      []noise             // by round
}

type key struct{ work, contestant string }

func newResults(contestants []contestant, works []workload) *results {
	r := &results{works: append(slices.Clone(works), processWorkload()), samples: map[key][][]float64{}}
	for _, c := range contestants {
		r.contestants = append(r.contestants, c.name)
	}
	return r
}

func (r *results) add(work, contestant string, figures []float64) {
	k := key{work, contestant}
	r.samples[k] = append(r.samples[k], figures)
}

// measured returns the contestants that have done a workload.
func (r *results) measured(work string) []string {
	return slices.DeleteFunc(slices.Clone(r.contestants), func(c string) bool { return r.samples[key{work, c}] == nil })
}

// rounds returns all measurements of one figure, in order; nil if there are none.
func (r *results) rounds(work, contestant, column string) []float64 {
	if base := map[string]string{addedP50: p50, addedP99: p99}[column]; base != "" {
		return r.combine(work, contestant, direct, base, func(own, direct float64) float64 { return own - direct })
	}
	samples := r.samples[key{work, contestant}]
	i := slices.Index(r.columns(work), column)
	if i < 0 {
		return nil
	}
	var all []float64
	for _, figures := range samples {
		if !math.IsNaN(figures[i]) {
			all = append(all, figures[i])
		}
	}
	return all
}

func (r *results) columns(work string) []string {
	for _, w := range r.works {
		if w.name == work {
			return w.columns
		}
	}
	return nil
}

// combine applies f to the measurements of one figure of two contestants, round
// by round: what the machine did in a round concerns both.
func (r *results) combine(work, a, b, column string, f func(a, b float64) float64) []float64 {
	ofA, ofB := r.rounds(work, a, column), r.rounds(work, b, column)
	var all []float64
	for i := range min(len(ofA), len(ofB)) {
		all = append(all, f(ofA[i], ofB[i]))
	}
	return all
}

// value returns the median of one figure; NaN if there is none.
func (r *results) value(work, contestant, column string) float64 {
	return median(r.rounds(work, contestant, column))
}

// subject is the contestant whose figures the others are compared with.
func subject(work string) string {
	if isQuota(work) {
		return limitedOne
	}
	return ours
}

// ratio returns the median of the rounds' ratios of the subject's figure to another
// contestant's; NaN if there is none.
func (r *results) ratio(work, than, column string) float64 {
	return median(r.combine(work, subject(work), than, column, func(own, theirs float64) float64 { return own / theirs }))
}

// median returns the middle value, or the mean of the two middle ones; NaN if
// there are no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}
