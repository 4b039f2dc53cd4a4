package main

import (
	"bytes"
	"io"
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

// TestReport has a machine that gets slower and slower, whose figures go through a file and into tables and charts.
func TestReport(t *testing.T) {
	r := newReport()
	for _, slow := range []float64{1, 10, 100, 1000} {
		r.add("small32", ours, figures{cpuPerRequest: 3 * slow})
		r.add("small32", nginx, figures{cpuPerRequest: 2 * slow})
		r.add("small32", direct, figures{cpuPerRequest: math.NaN(), perSecond: 400})
		r.add("streams500", ours, figures{p50: 5 * slow})
		r.add("streams500", direct, figures{p50: 3 * slow})
	}
	r.summarize()
	dir := t.TempDir()
	file := filepath.Join(dir, "figures.json")
	if err := r.write(file); err != nil {
		t.Fatal(err)
	}
	r, err := readReport(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, work, contestant, figure, want string }{
		{"median of four", "small32", ours, cpuPerRequest, "165"},
		{"ratio round by round", "small32", nginx, cpuPerRequest, "1.50 (110)"},
		{"unknown", "small32", direct, cpuPerRequest, "-"},
		{"nothing to compare with", "small32", direct, perSecond, "400"},
		{"not measured", "small32", caddy, cpuPerRequest, "-"},
		{"added", "streams500", ours, addedP50, "110"},
	} {
		if got := r.cell(test.contestant, column{work: test.work, figure: test.figure}); got != test.want {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}
	if err := r.writeCharts(dir); err != nil {
		t.Fatal(err)
	}
	chart, err := os.ReadFile(filepath.Join(dir, "performance-cpu.svg"))
	for _, want := range []string{">proxy<", ">165<", ">nginx<", ">110<"} {
		if err != nil || !bytes.Contains(chart, []byte(want)) {
			t.Errorf("no %s in the chart (%v)", want, err)
		}
	}
}

func TestNoise(t *testing.T) {
	from, to := machine{busy: 100, all: 1000, own: 10}, machine{busy: 105, all: 1010, own: 12}
	if got := others(from, to); got != 0.3 {
		t.Errorf("others used %g, want 0.3: 3 s of 10", got)
	}
	for n, noisy := range map[noise]bool{{0, 0}: false, {quiet, quiet}: false, {quiet + 0.01, 0}: true, {0, quiet + 0.01}: true} {
		r := &report{Others: []noise{{0, 0}, n, {0, 0}}}
		if strings.Contains(r.text(), "NOISY") != noisy {
			t.Errorf("%+v: want noisy %t in:\n%s", n, noisy, r.text())
		}
	}
}

// TestJudge measures against one limit at a time.
func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name, work, column string
		ours, nginx        float64
		want               string
	}{
		{"at the bound", "small32", cpuPerRequest, 200, 100, "ok"},
		{"missed", "small32", cpuPerRequest, 399, 100, "missed"},
		{"collapsed", "small32", cpuPerRequest, 401, 100, "collapsed"},
		{"throughput reached", "post10", megabytes, 50, 100, "ok"},
		{"throughput missed", "post10", megabytes, 26, 100, "missed"},
		{"throughput collapsed", "post10", megabytes, 24, 100, "collapsed"},
		{"latency collapsed", "streams500", p50, 201, 100, "collapsed"},
		{"latencies so short that their ratio means nothing", "streams500", p50, 1.9, 0.2, "missed"},
		{"the figure itself", "streams2000", mibInAll, 129, 1, "missed"},
	} {
		r := newReport()
		r.add(test.work, ours, figures{test.column: test.ours})
		r.add(test.work, nginx, figures{test.column: test.nginx})
		r.summarize()
		if len(r.Limits) != 1 || r.Limits[0].state != test.want || (collapsed(r.Limits) != nil) != (test.want == "collapsed") {
			t.Errorf("%s: %+v, want %s", test.name, r.Limits, test.want)
		}
	}
	for _, l := range limits() { // on what is never measured
		if !slices.ContainsFunc(append(workloads, processWork), func(w workload) bool { return w.name == l.work && slices.Contains(w.columns, l.column) }) {
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
	o.rounds, o.duration = 1, 200*time.Millisecond
	r, err := compare(t.Context(), o, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", r.text())
	for _, w := range append(o.workloads(), processWork) {
		for _, column := range w.columns {
			if r.at(w.name, o.only[0], column).Rounds == nil {
				t.Errorf("no %s of %s", column, w.name)
			}
		}
	}
}
