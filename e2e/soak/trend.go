package main

import (
	"fmt"
	"math"
	"time"
)

// A trend is a straight line through samples, by least squares.
type trend struct {
	slope float64 // per hour
	err   float64 // the slope's standard error
	span  time.Duration
}

// blocks is how many figures the samples of a run are made into before a line is
// fitted. The standard error holds for figures that do not depend on each other;
// those of successive seconds do, since the memory, say, that one upload took is
// given back only some collections later. Those of a sixteenth of the run hardly do.
const blocks = 16

// fitTrend fits a line through the values, sampled at these times; of tells what
// stands for a block of them. It takes three values at least.
func fitTrend(at []time.Duration, values []float64, of func([]float64) float64) trend {
	var x, y []float64
	n := min(blocks, len(at))
	for i := range n {
		from, to := i*len(at)/n, (i+1)*len(at)/n
		var hours []float64
		for _, t := range at[from:to] {
			hours = append(hours, t.Hours())
		}
		x, y = append(x, mean(hours)), append(y, of(values[from:to]))
	}
	slope, err := fitLine(x, y)
	return trend{slope: slope, err: err, span: at[len(at)-1] - at[0]}
}

// mean is the arithmetic one.
func mean(values []float64) float64 {
	var sum float64
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

// fitLine returns the slope of the line through the points, and its standard error.
func fitLine(x, y []float64) (slope, err float64) {
	meanX, meanY := mean(x), mean(y)
	var xx, xy float64
	for i := range x {
		xx += (x[i] - meanX) * (x[i] - meanX)
		xy += (x[i] - meanX) * (y[i] - meanY)
	}
	slope = xy / xx
	var squares float64
	for i := range x {
		residual := y[i] - meanY - slope*(x[i]-meanX)
		squares += residual * residual
	}
	return slope, math.Sqrt(squares / float64(len(x)-2) / xx)
}

// grown is by how much the value has grown over the samples for certain: what is
// left of the slope less three standard errors.
func (t trend) grown() float64 { return max(0, t.slope-3*t.err) * t.span.Hours() }

func (t trend) String() string { return fmt.Sprintf("%+.2f ± %.2f per hour", t.slope, t.err) }
