package main

import (
	"math"
	"slices"
	"time"

	"gonum.org/v1/gonum/stat"
)

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// summary returns the number of latencies and, if there are any, their percentiles.
func summary(byClient [][]float64) (n float64, measured figures) {
	all := slices.Concat(byClient...)
	if len(all) == 0 {
		return 0, nil
	}
	slices.Sort(all)
	return float64(len(all)), figures{p50: stat.Quantile(0.5, stat.Empirical, all, nil), p99: stat.Quantile(0.99, stat.Empirical, all, nil)}
}

// median returns the middle value, or the mean of the two middle ones; NaN if there are no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return stat.Mean(sorted[(len(sorted)-1)/2:len(sorted)/2+1], nil)
}
