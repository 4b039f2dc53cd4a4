package main

import (
	"fmt"
	"math"
)

// A limit is what the proxy is to reach: at most the bound, of MB/s at least.
type limit struct {
	work, figure string
	bound        float64
	than         string  // a contestant that the proxy's figure is divided by; empty: the figure itself
	grain        float64 // a difference in the figure's unit that is no collapse: other work can delay anything for so long
}

var limits = []limit{
	{"small32", cpuEach, 0.6, caddy, 0},
	{"small32", cpuEach, 0.6, reverseProxy, 0},
	{"small32", cpuEach, 2, nginx, 60}, // cheap system calls: then nginx gains, and net/http doesn't
	{"small32", p99, 1, caddy, 10},
	{"small32", p99, 1, reverseProxy, 10},
	{"post10", megabytes, 0.5, nginx, 0},
	{"post10", megabytes, 1, baseline, 0},
	{"get10", megabytes, 1, baseline, 0},
	{"streams500", p50, 1, nginx, 2},
	{"streams500", p50, 1, haproxy, 2},
	{"streams500", p50, 1, haproxyNoDelay, 2},
	{"streams500", p99, 1, nginx, 20},
	{"streams500", p99, 1, haproxy, 20},
	{"streams500", p99, 1, haproxyNoDelay, 20},
	{"streams500", cpuEach, 1, reverseProxy, 0},
	{"streams500", cpuEach, 1.15, nginx, 0},
	{"streams500", kbPerStream, 38, "", 0},
	{"streams2000", p50, 1, nginx, 2},
	{"streams2000", p99, 1, nginx, 20},
	{"streams2000", p50, 1, haproxy, 2},
	{"streams2000", p50, 1, haproxyNoDelay, 2},
	{"streams2000", p99, 1, haproxy, 20},
	{"streams2000", p99, 1, haproxyNoDelay, 20},
	{"streams2000", cpuEach, 1, reverseProxy, 0},
	{"streams2000", cpuEach, 1.15, nginx, 0},
	{"streams2000", kbPerStream, 38, "", 0},
	{"streams2000", mibInAll, 128, "", 0},
	{"process", idleRSS, 12, "", 0},
	{"process", binarySize, 8, "", 0},
	{"quota50", p99, 1, limited, 10},
	{"quota25", p99, 1, limited, 10},
}

// judge says what has become of each limit that there are figures for: state is ok, missed, or collapsed, which is missed by far.
func (r *report) judge(say func(l limit, value float64, state string)) {
	for _, l := range limits {
		own := r.median(l.work, subject(l.work), l.figure)
		value, bound := own, l.bound
		if l.than != "" {
			value = r.ratio(l.work, l.than, l.figure)
			bound *= r.median(l.work, l.than, l.figure)
		}
		times := value / l.bound // by which it is missed
		if l.figure == megabytes {
			times = 1 / times
		}
		switch {
		case math.IsNaN(value): // not measured
		case times > 2 && math.Abs(own-bound) > l.grain:
			say(l, value, "collapsed")
		case times > 1:
			say(l, value, "missed")
		default:
			say(l, value, "ok")
		}
	}
}

// String names the limit, such as "small32, CPU µs each: at most 0.6 × caddy".
func (l limit) String() string {
	s := fmt.Sprintf("%s, %s: at most %g", l.work, l.figure, l.bound)
	if l.figure == megabytes {
		s = fmt.Sprintf("%s, %s: at least %g", l.work, l.figure, l.bound)
	}
	if l.than != "" {
		s += " × " + l.than
	}
	return s
}
