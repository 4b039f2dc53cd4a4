package main

import (
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// verify checks, after the traffic, that everything adds up, that nothing is left,
// and that the proxy ends in an orderly way.
func (l *lane) verify() {
	select {
	case <-l.proxy.Done():
		return // it is told already
	default:
	}
	l.awaitLines()
	l.readLog()
	l.late = reconcile(l.options, l.results, l.lines, l.upstream.seen, l.stalls, l.problems)
	if m, err := l.proxy.Metrics(); err != nil {
		l.problems.add("%v", err)
	} else {
		checkMetrics(m, l.lines, l.problems)
	}
	checkHealth(l.proxy, l.lines, l.problems)
	l.checkRest()
	l.checkTrends()
	l.checkEnd()
}

// eventually waits for ok, up to proxytest.Timeout, and returns what it was last.
func eventually(ok func() bool) bool {
	for deadline := time.Now().Add(proxytest.Timeout); ; time.Sleep(50 * time.Millisecond) {
		if ok() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
	}
}

// awaitLines waits for the log lines of the last requests, whose clients may have
// left. Those that do not come are missed by reconcile.
func (l *lane) awaitLines() {
	expected := 0
	for _, r := range l.results {
		if newPlan(l.options.seed, r.number).reaches() {
			expected++
		}
	}
	eventually(func() bool {
		completed := 0
		for _, line := range l.proxy.Logs() {
			if line.Message() == proxytest.MsgRequestCompleted {
				completed++
			}
		}
		return completed >= expected
	})
}

// readLog reads the log, in which there is to be no trouble.
func (l *lane) readLog() {
	for _, raw := range l.proxy.Logs() {
		if level := raw.Text("level"); level != "INFO" {
			l.problems.add("the log has trouble: %.2000s", raw.Raw)
		}
		line, ok, err := parseLine(raw)
		switch {
		case err != nil:
			l.problems.add("the log has a line that is not of the traffic: %.300s", raw.Raw)
		case ok:
			l.lines = append(l.lines, line)
		}
	}
}

// checkRest closes all connections and waits until the proxy holds no more than before
// the traffic.
func (l *lane) checkRest() {
	if peak, err := peakRSS(l.proxy.PID); err != nil {
		l.problems.add("%v", err)
	} else if l.peak = peak; !l.options.race && peak > containerMemory {
		l.problems.add("the proxy had %.1f MiB of memory, more than the %d of its container", peak, containerMemory)
	}
	l.upstream.hangUp()
	var problem error
	if !eventually(func() bool {
		l.after, problem = takeSample(l.proxy)
		return problem == nil && l.after.goroutines <= l.before.goroutines && l.after.descriptors <= l.before.descriptors
	}) {
		l.problems.add("after the traffic the proxy has %v goroutines and %v descriptors, before it had %v and %v (%v)",
			l.after.goroutines, l.after.descriptors, l.before.goroutines, l.before.descriptors, problem)
	}
}

// checkTrends looks for what grows. The race detector's own memory may.
func (l *lane) checkTrends() {
	for _, q := range quantities {
		t, ok := q.trend(l.samples, l.options.duration)
		switch {
		case !ok && q.settles == 0:
			l.problems.add("%s: %d samples are too few for a line", q.name, len(l.samples))
		case t.grown() > q.tolerated && !(l.options.race && q.name == rss):
			l.problems.add("%s: growth of %v, by %.1f over %v for certain", q.name, t, t.grown(), t.span.Round(time.Second))
		}
	}
}

// checkEnd ends the proxy.
func (l *lane) checkEnd() {
	if err := l.proxy.Signal(syscall.SIGTERM); err != nil {
		l.problems.add("%v", err)
		return
	}
	code, err := l.proxy.Wait(proxytest.Timeout)
	if err != nil || code != 0 {
		l.problems.add("after SIGTERM the proxy ended with exit code %d (%v)", code, err)
		return
	}
	if said := l.proxy.Stderr(); said != "" {
		l.problems.add("the proxy wrote to stderr: %.4000s", said)
	}
	var last []string
	lines := l.proxy.Logs()
	for _, line := range lines[max(0, len(lines)-3):] {
		last = append(last, line.Message())
	}
	want := []string{proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete}
	if strings.Join(last, "; ") != strings.Join(want, "; ") {
		l.problems.add("the log ends with %q, want %q", last, want)
	}
}
