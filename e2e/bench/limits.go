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
	// grain is a difference that is the machine's rather than a collapse, in the
	// figure's unit: other work can delay anything for so long.
	grain float64
}

// collapseFactor is by how much a limit has to be missed to fail a quick run.
const collapseFactor = 2

// limits are those of the project, which README.md shows.
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
		{work: processName, column: idleRSS, bound: 12},
		{work: processName, column: binarySize, bound: 8},
	}
	for _, n := range streamCounts {
		work := streamsName(n)
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
	for _, percent := range quotaLoads {
		all = append(all, limit{work: quotaName(percent), column: p99, than: limited, bound: 1, grain: 10})
	}
	return append(all, limit{work: streamsName(2000), column: mibInAll, bound: 128})
}

// A verdict says how a limit and the measured figure compare.
type verdict struct {
	limit
	value     float64
	met       bool
	collapsed bool
}

// judge compares r with those limits that it has the figures for.
func judge(r *results) []verdict {
	var all []verdict
	for _, l := range limits() {
		v := verdict{limit: l}
		own, theirs := r.value(l.work, subject(l.work), l.column), 1.0
		if v.value = own; l.than != "" {
			v.value, theirs = r.ratio(l.work, l.than, l.column), r.value(l.work, l.than, l.column)
		}
		if math.IsNaN(v.value) {
			continue
		}
		if l.atLeast {
			v.met = v.value >= l.bound
			v.collapsed = v.value < l.bound/collapseFactor
		} else {
			v.met = v.value <= l.bound
			v.collapsed = v.value > l.bound*collapseFactor && own-l.bound*theirs > l.grain
		}
		all = append(all, v)
	}
	return all
}

// String names the limit, such as "small32, CPU µs/request: at most 0.6 × caddy".
func (l limit) String() string {
	how := "at most"
	if l.atLeast {
		how = "at least"
	}
	s := fmt.Sprintf("%s, %s: %s %g", l.work, l.column, how, l.bound)
	if l.than != "" {
		s += " × " + l.than
	}
	return s
}

// collapsed returns an error for each limit that is missed by far.
func collapsed(verdicts []verdict) error {
	var all []error
	for _, v := range verdicts {
		if v.collapsed {
			all = append(all, fmt.Errorf("collapsed: %v, measured %s", v.limit, format(v.value)))
		}
	}
	return errors.Join(all...)
}
