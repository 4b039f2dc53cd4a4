package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

// TestReport has a machine that gets slower and slower, and what its report says of it in tables, in the chart and on noise.
func TestReport(t *testing.T) {
	r := newReport()
	for _, slow := range []float64{1, 10, 100, 1000} {
		r.others = append(r.others, quiet)
		r.add("small32", ours, figures{cpuEach: 3 * slow})
		r.add("small32", nginx, figures{cpuEach: 2 * slow})
		r.add("small32", direct, figures{cpuEach: math.NaN(), perSecond: 400})
		r.add("streams500", ours, figures{p50: 5 * slow})
		r.add("streams500", direct, figures{p50: 3 * slow})
	}
	for _, test := range []struct{ name, work, contestant, figure, want string }{
		{"median of four", "small32", ours, cpuEach, "165"},
		{"ratio round by round", "small32", nginx, cpuEach, "1.50 (110)"},
		{"unknown", "small32", direct, cpuEach, "-"},
		{"nothing to compare with", "small32", direct, perSecond, "400"},
		{"not measured", "small32", caddy, cpuEach, "-"},
		{"added", "streams500", ours, added + p50, "110"},
	} {
		if got := r.cell(test.contestant, column{work: test.work, figure: test.figure}); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
	file := filepath.Join(t.TempDir(), "chart.svg")
	proxytest.Check(t, r.writeChart(file))
	chart := string(proxytest.Must(os.ReadFile(file))(t))
	for _, want := range []string{">proxy<", ">165<", ">nginx<", ">110<"} {
		if !strings.Contains(chart, want) {
			t.Errorf("no %s in the chart", want)
		}
	}
	for _, noisy := range []bool{false, true} {
		if got := r.text(); strings.Contains(got, "NOISY") != noisy {
			t.Errorf("others used %v: want noisy %t in:\n%s", r.others, noisy, got)
		}
		r.others[1] += 0.01
	}
}

func TestNoise(t *testing.T) {
	from, to := machine{busy: 100, all: 1000, own: 10}, machine{busy: 105, all: 1010, own: 12}
	if got := others(from, to); got != 0.3 {
		t.Errorf("others used %g, want 0.3: 3 s of 10", got)
	}
}

// TestJudge measures against one limit at a time.
func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name, work, figure string
		ours, nginx        float64
		want               string
	}{
		{"at the bound", "small32", cpuEach, 200, 100, "ok"},
		{"missed", "small32", cpuEach, 399, 100, "missed"},
		{"collapsed", "small32", cpuEach, 401, 100, "collapsed"},
		{"throughput reached", "post10", megabytes, 50, 100, "ok"},
		{"throughput missed", "post10", megabytes, 26, 100, "missed"},
		{"throughput collapsed", "post10", megabytes, 24, 100, "collapsed"},
		{"latency collapsed", "streams500", p50, 201, 100, "collapsed"},
		{"latencies so short that their ratio means nothing", "streams500", p50, 1.9, 0.2, "missed"},
		{"the figure itself", "streams2000", mibInAll, 129, 1, "missed"},
	} {
		r := newReport()
		r.add(test.work, ours, figures{test.figure: test.ours})
		r.add(test.work, nginx, figures{test.figure: test.nginx})
		var states []string
		r.judge(func(_ limit, _ float64, state string) { states = append(states, state) })
		if !slices.Equal(states, []string{test.want}) {
			t.Errorf("%s: %q, want %s", test.name, states, test.want)
		}
	}
	for _, l := range limits { // on what is never measured
		if !slices.ContainsFunc(append(workloads, processWork), func(w workload) bool {
			return w.name == l.work && slices.Contains(w.columns, l.figure)
		}) {
			t.Errorf("%v: no such figure", l)
		}
	}
}

// TestMeasure measures for real, without what has to be installed.
func TestMeasure(t *testing.T) {
	measureAll(t, options{only: []string{ours, direct}, work: []string{"small1", "post1", "get10", "streams500"}})
}

// measureAll measures what o asks for, and wants all figures of the first contestant.
func measureAll(t *testing.T, o options) {
	t.Helper()
	o.rounds, o.duration = 1, time.Second // in which a busy machine, too, begins to answer
	b := proxytest.Must(newTestbed())(t)
	defer func() { proxytest.Check(t, b.close()) }()
	r := proxytest.Must(b.compare(t.Context(), o))(t)
	t.Logf("\n%s", r.text())
	for _, w := range append(o.workloads(), processWork) {
		for _, figure := range w.columns {
			if r.cell(o.only[0], column{work: w.name, figure: figure}) == "-" {
				t.Errorf("no %s of %s", figure, w.name)
			}
		}
	}
}
