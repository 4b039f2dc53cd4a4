package main

import (
	"bytes"
	"flag"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i, j := range rand.Perm(100) {
		hundred[i] = time.Duration(j + 1)
	}
	for _, test := range []struct {
		name   string
		values []time.Duration
		p      float64
		want   time.Duration
	}{
		{name: "nothing", p: 50, want: 0},
		{name: "one value", values: []time.Duration{7}, p: 99, want: 7},
		{name: "lower of two", values: []time.Duration{9, 3}, p: 50, want: 3},
		{name: "middle of three", values: []time.Duration{9, 3, 5}, p: 50, want: 5},
		{name: "p50 of 1 to 100", values: hundred, p: 50, want: 50},
		{name: "p99 of 1 to 100", values: hundred, p: 99, want: 99},
		{name: "p100 of 1 to 100", values: hundred, p: 100, want: 100},
		{name: "p0 of 1 to 100", values: hundred, p: 0, want: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := percentile(test.values, test.p); got != test.want {
				t.Errorf("got %d, want %d", got, test.want)
			}
		})
	}
}

// TestReadCPU burns processor time in a grandchild and looks for it.
func TestReadCPU(t *testing.T) {
	cmd := exec.Command("sh", "-c", `sh -c 'while :; do :; done' & echo $!; wait`)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		processes, _ := family(cmd.Process.Pid)
		for _, p := range processes {
			_ = syscall.Kill(p.PID, syscall.SIGKILL) // it may have ended
		}
		_ = cmd.Wait() // killed
	})
	if _, err := io.ReadFull(out, make([]byte, 1)); err != nil { // the grandchild exists
		t.Fatal(err)
	}
	if processes, err := family(cmd.Process.Pid); len(processes) != 2 {
		t.Fatalf("the family is %+v (%v), want a parent and a child", processes, err)
	}
	begun := time.Now()
	for {
		used, err := readCPU(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		took := time.Since(begun)
		if used >= 0.1 {
			t.Logf("used %v s after %v", used, took)
			if used > took.Seconds()+1 {
				t.Errorf("one busy process used %v s in %v", used, took)
			}
			return
		}
		if took > patience {
			t.Fatalf("used only %v s in %v", used, took)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestOthers(t *testing.T) {
	from, to := machine{busy: 100, all: 1000, own: 10}, machine{busy: 105, all: 1010, own: 12}
	if got := others(from, to); got != 0.3 {
		t.Errorf("got %g, want 0.3: 3 s of 10", got)
	}
	if m, err := readMachine(); err != nil || m.own <= 0 || m.busy < m.own || m.all < m.busy {
		t.Errorf("read %+v, error %v", m, err)
	}
}

func TestEvent(t *testing.T) {
	for _, sent := range []time.Duration{0, 1, 123456789, 99 * time.Hour} {
		event := appendEvent(nil, sent)
		if len(event) != eventSize || !bytes.HasSuffix(event, []byte("\n\n")) {
			t.Errorf("%d bytes, want %d and an empty line: %q", len(event), eventSize, event)
		}
		stamps := 0
		for line := range bytes.Lines(event) {
			if got, ok := parseEvent(line); ok {
				stamps++
				if got != sent {
					t.Errorf("read %d back as %d", sent, got)
				}
			}
		}
		if stamps != 1 {
			t.Errorf("%d lines with a stamp, want 1: %q", stamps, event)
		}
	}
}

func TestResults(t *testing.T) {
	r := newResults([]contestant{{name: ours}, {name: nginx}, {name: direct}}, chosenWorkloads(options{work: []string{"small32", "streams500"}}))
	nan := math.NaN()
	for round, factor := range []float64{1, 10, 100} { // a machine that gets slower and slower
		r.add("small32", ours, []float64{30 * factor, 100 / factor, 2 * factor, 3 * factor})
		r.add("small32", nginx, []float64{20 * factor, 200 / factor, 1 * factor, 2 * factor})
		r.add("small32", direct, []float64{nan, 400, float64(round), 2})
		r.add("streams500", ours, []float64{1, 100, 5 * factor, 9 * factor, nan, nan, 50, 100})
		r.add("streams500", direct, []float64{nan, 100, 3 * factor, 4 * factor, nan, nan, nan, nan})
	}
	for _, test := range []struct {
		name string
		got  float64
		want float64
	}{
		{name: "median", got: r.value("small32", ours, cpuPerRequest), want: 300},
		{name: "ratio round by round", got: r.ratio("small32", nginx, cpuPerRequest), want: 1.5},
		{name: "unknown", got: r.value("small32", direct, cpuPerRequest), want: nan},
		{name: "ratio to unknown", got: r.ratio("small32", direct, cpuPerRequest), want: nan},
		{name: "not measured", got: r.value("small32", caddy, cpuPerRequest), want: nan},
		{name: "added", got: r.value("streams500", ours, addedP50), want: 20},
		{name: "added, p99", got: r.value("streams500", ours, addedP99), want: 50},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.got != test.want && !(math.IsNaN(test.got) && math.IsNaN(test.want)) {
				t.Errorf("got %g, want %g", test.got, test.want)
			}
		})
	}
	for _, out := range []string{r.text(judge(r)), r.markdown()} {
		if !strings.Contains(out, "1.50 (200)") {
			t.Errorf("the ratio to nginx' CPU per request, and that, are missing in:\n%s", out)
		}
		if strings.Contains(out, "NOISY") {
			t.Errorf("called noisy:\n%s", out)
		}
	}
	r.others = append(r.others, noise{Before: 0.01, During: quiet * 2})
	if !strings.Contains(r.head(), "NOISY") {
		t.Errorf("not called noisy:\n%s", r.head())
	}
	if err := r.report(judge(r)).write(filepath.Join(t.TempDir(), "figures.json")); err != nil {
		t.Error(err) // NaN is no JSON
	}
}

// TestJudge measures against one limit at a time; nginx' figures are 100
// throughout.
func TestJudge(t *testing.T) {
	for _, test := range []struct {
		name           string
		work, column   string
		ours           float64
		met, collapsed bool
	}{
		{name: "at the bound", work: "small32", column: cpuPerRequest, ours: 200, met: true},
		{name: "missed", work: "small32", column: cpuPerRequest, ours: 399},
		{name: "collapsed", work: "small32", column: cpuPerRequest, ours: 401, collapsed: true},
		{name: "throughput reached", work: "post10", column: megabytes, ours: 50, met: true},
		{name: "throughput missed", work: "post10", column: megabytes, ours: 26},
		{name: "throughput collapsed", work: "post10", column: megabytes, ours: 24, collapsed: true},
		{name: "latency collapsed", work: "streams500", column: p50, ours: 201, collapsed: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newResults([]contestant{{name: ours}, {name: nginx}}, chosenWorkloads(options{work: []string{test.work}}))
			figures := func(v float64) []float64 {
				all := make([]float64, len(r.columns(test.work)))
				for i, column := range r.columns(test.work) {
					all[i] = math.NaN()
					if column == test.column {
						all[i] = v
					}
				}
				return all
			}
			r.add(test.work, ours, figures(test.ours))
			r.add(test.work, nginx, figures(100))
			verdicts := judge(r)
			if len(verdicts) != 1 {
				t.Fatalf("%d verdicts, want 1: %+v", len(verdicts), verdicts)
			}
			if v := verdicts[0]; v.met != test.met || v.collapsed != test.collapsed {
				t.Errorf("%v: value %g, met %t, collapsed %t; want %t, %t", v.limit, v.value, v.met, v.collapsed, test.met, test.collapsed)
			}
			if failed := collapsed(verdicts) != nil; failed != test.collapsed {
				t.Errorf("fails a quick run: %t, want %t", failed, test.collapsed)
			}
		})
	}
}

// TestGrain is about latencies so short that their ratio means nothing.
func TestGrain(t *testing.T) {
	r := newResults([]contestant{{name: ours}, {name: nginx}}, chosenWorkloads(options{work: []string{"streams500"}}))
	nan := math.NaN()
	r.add("streams500", ours, []float64{nan, nan, 1.9, nan, nan, nan, nan, nan})
	r.add("streams500", nginx, []float64{nan, nan, 0.2, nan, nan, nan, nan, nan})
	if v := judge(r); len(v) != 1 || v[0].met || v[0].collapsed {
		t.Errorf("got %+v, want a limit that is missed but not collapsed", v)
	}
}

// TestLimitsNameFigures catches limits on what is never measured.
func TestLimitsNameFigures(t *testing.T) {
	r := newResults(all(), workloads())
	for _, l := range limits() {
		if !strings.Contains(strings.Join(r.columns(l.work), "\n"), l.column) {
			t.Errorf("%v: no such figure", l)
		}
	}
}

func TestFlags(t *testing.T) {
	for _, test := range []struct {
		name string
		args []string
		want error
	}{
		{name: "none"},
		{name: "names", args: []string{"-only", "proxy,nginx", "-work", "small32"}},
		{name: "help", args: []string{"-h"}, want: flag.ErrHelp},
		{name: "unknown contestant", args: []string{"-only", "apache"}, want: errUsage},
		{name: "unknown workload", args: []string{"-work", "small"}, want: errUsage},
		{name: "argument", args: []string{"small32"}, want: errUsage},
		{name: "no rounds", args: []string{"-rounds", "0"}, want: errUsage},
		{name: "figures without charts", args: []string{"-from", "figures.json"}, want: errUsage},
		{name: "endless", args: []string{"-duration", "2m"}, want: errUsage},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := parseFlags(test.args, io.Discard); err != test.want {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}

// TestMeasure runs the smallest and the streaming workload for real, without
// what has to be installed.
func TestMeasure(t *testing.T) {
	measureAll(t, options{only: []string{ours, direct}, work: []string{"small1", "post1", "get10", "streams500"}, rounds: 1, duration: 200 * time.Millisecond})
}

// measureAll measures what o asks for, and wants all figures.
func measureAll(t *testing.T, o options) {
	t.Helper()
	if err := raiseFileLimit(); err != nil {
		t.Fatal(err)
	}
	up, err := startUpstream(true)
	if err != nil {
		t.Fatal(err)
	}
	defer up.close()
	contestants, err := resolve(o)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := compare(t.Context(), o, up, contestants, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", &out)
	for line := range strings.Lines(out.String()) {
		if strings.HasPrefix(line, ours) && strings.Contains(line, " - ") {
			t.Errorf("a figure is missing: %s", line)
		}
	}
}

// TestUpstreamRefuses is what makes a contestant that adds no header fail.
func TestUpstreamRefuses(t *testing.T) {
	up, err := startUpstream(true)
	if err != nil {
		t.Fatal(err)
	}
	defer up.close()
	target, err := start(contestant{name: direct}, up, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{direct, ours} {
		target.name = name // only direct's requests have the header
		c, err := target.dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		err = c.do(target.request("POST", smallPath, 10), smallAnswerSize)
		c.conn.Close()
		if refused := err != nil; refused != (name == ours) {
			t.Errorf("request of %s: error %v", name, err)
		}
	}
}

func TestMissingPackage(t *testing.T) {
	_, err := findDebian("no-such-program", "no-such-package")
	if err == nil || !strings.Contains(err.Error(), "apt-get install --no-install-recommends no-such-package") {
		t.Errorf("error %v, want one that says how to install it", err)
	}
}
