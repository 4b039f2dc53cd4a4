package main

import (
	"errors"
	"fmt"
	"math"
)

// A limit is what the proxy is to reach.
type limit struct {
	work, column string
	than         string  // a contestant that the proxy's figure is divided by; empty: the figure itself
	bound        float64 // at most, or at least
	atLeast      bool
	grain        float64 // a difference in the figure's unit that is no collapse: other work can delay anything for so long
}

// limits are those of the project.
func limits() []limit {
	all := []limit{
		{work: "small32", column: cpuPerRequest, than: caddy, bound: 0.6},
		{work: "small32", column: cpuPerRequest, than: reverseProxy, bound: 0.6},
		{work: "small32", column: cpuPerRequest, than: nginx, bound: 2, grain: 60}, // cheap system calls: then nginx gains, and net/http doesn't
		{work: "small32", column: p99, than: caddy, bound: 1, grain: 10},
		{work: "small32", column: p99, than: reverseProxy, bound: 1, grain: 10},
		{work: "post10", column: megabytes, than: nginx, bound: 0.5, atLeast: true},
		{work: "post10", column: megabytes, than: baseline, bound: 1, atLeast: true},
		{work: "get10", column: megabytes, than: baseline, bound: 1, atLeast: true},
		{work: "process", column: idleRSS, bound: 12},
		{work: "process", column: binarySize, bound: 8},
		{work: "streams2000", column: mibInAll, bound: 128},
		{work: "quota50", column: p99, than: limited, bound: 1, grain: 10},
		{work: "quota25", column: p99, than: limited, bound: 1, grain: 10},
	}
	for _, work := range []string{"streams500", "streams2000"} {
		for _, than := range []string{nginx, haproxy, haproxyNoDelay} {
			all = append(all,
				limit{work: work, column: p50, than: than, bound: 1, grain: 2},
				limit{work: work, column: p99, than: than, bound: 1, grain: 20})
		}
		all = append(all,
			limit{work: work, column: cpuPerEvent, than: reverseProxy, bound: 1},
			limit{work: work, column: cpuPerEvent, than: nginx, bound: 1.15},
			limit{work: work, column: kbPerStream, bound: 38})
	}
	return all
}

// String names the limit, such as "small32, CPU µs/request: at most 0.6 × caddy".
func (l limit) String() string {
	s := fmt.Sprintf("%s, %s: %s %g", l.work, l.column, map[bool]string{false: "at most", true: "at least"}[l.atLeast], l.bound)
	if l.than != "" {
		s += " × " + l.than
	}
	return s
}

// A verdict says how a limit and the measured figure compare.
type verdict struct {
	Limit string  `json:"limit"`
	Value float64 `json:"value"`
	Met   bool    `json:"met"`
	state string  // ok, missed or collapsed
}

// judge compares r with those limits that it has the figures for.
func judge(r *report) []verdict {
	var all []verdict
	for _, l := range limits() {
		own, theirs := r.at(l.work, subject(l.work), l.column).Median, 1.0
		value := own
		if l.than != "" {
			other := r.at(l.work, l.than, l.column)
			value, theirs = other.Ratio, other.Median
		}
		if value == 0 || math.IsNaN(value) { // not measured
			continue
		}
		times := value / l.bound // by which it is missed
		if l.atLeast {
			times = l.bound / value
		}
		v := verdict{Limit: l.String(), Value: value, Met: times <= 1, state: "ok"}
		if !v.Met {
			v.state = "missed"
		}
		if times > 2 && math.Abs(own-l.bound*theirs) > l.grain {
			v.state = "collapsed"
		}
		all = append(all, v)
	}
	return all
}

// collapsed returns an error for each limit that is missed by far: that fails a quick run.
func collapsed(verdicts []verdict) error {
	var all []error
	for _, v := range verdicts {
		if v.state == "collapsed" {
			all = append(all, fmt.Errorf("collapsed: %s, measured %s", v.Limit, format(v.Value)))
		}
	}
	return errors.Join(all...)
}
