package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// verify checks, after the traffic, that everything adds up, that nothing is left,
// and that the proxy ends in an orderly way.
func (l *lane) verify(stalls *pulse) {
	select {
	case <-l.proxy.Done():
		return // it is told already
	default:
	}
	l.awaitLines()
	lines := completed(l.proxy.Logs(), &l.problems)
	if m, err := l.proxy.Metrics(); err != nil {
		l.problems.add("%v", err)
	} else {
		checkMetrics(m, lines, &l.problems)
	}
	checkHealth(l.proxy, lines, &l.problems)
	l.rest()
	checkFlat(l.options, l.samples, &l.problems)
	l.end()
	log := l.proxy.Logs()
	l.atEnd = checkLog(log, &l.problems)
	l.lines = completed(log, &l.problems)
	l.late = reconcile(l.options, l.results, l.lines, l.upstream.seen, stalls, &l.problems)
}

// awaitLines waits for the log lines of the last requests, whose clients may have
// left. Those that do not come are missed by reconcile.
func (l *lane) awaitLines() {
	missing := 0
	for _, r := range l.results {
		if newPlan(l.options.seed, r.number).reaches() {
			missing++
		}
	}
	_, _ = l.proxy.WaitLine("the last request", proxytest.Timeout, func(line proxytest.Line) bool {
		if line.Message() == proxytest.MsgRequestCompleted {
			missing--
		}
		return missing <= 0
	})
}

// A logLine is a "request completed" of the proxy's log.
type logLine struct {
	number     int
	proxyID    string
	method     string
	status     int
	code       string // of the error
	attempts   int
	upstreamID string
	latency    time.Duration // in whole milliseconds
	bytesIn    int64
	bytesOut   int64
}

func (l logLine) String() string {
	return fmt.Sprintf("%s, status %d %s after %d attempts and %v, upstream id %q, %d bytes in, %d out",
		l.proxyID, l.status, l.code, l.attempts, l.latency, l.upstreamID, l.bytesIn, l.bytesOut)
}

// completed returns the lines of requests.
func completed(log []proxytest.Line, problems *problems) (lines []logLine) {
	for _, l := range log {
		if l.Message() != proxytest.MsgRequestCompleted {
			continue
		}
		number, err := numberOf(l.Text("path"))
		if err != nil {
			problems.add("the log has a line that is not of the traffic: %.300s", l.Raw)
			continue
		}
		code, why, _ := strings.Cut(l.Text("error"), ": ")
		if code == codeClientGone && why == "the client stopped reading the answer" {
			code = codeSlowReader
		}
		lines = append(lines, logLine{
			number:     number,
			proxyID:    l.Text("request_id"),
			method:     l.Text("method"),
			status:     int(l.Number("status")),
			code:       code,
			attempts:   int(l.Number("attempts")),
			upstreamID: l.Text("upstream_request_id"),
			latency:    time.Duration(l.Number("latency_ms")) * time.Millisecond,
			bytesIn:    int64(l.Number("bytes_in")),
			bytesOut:   int64(l.Number("bytes_out")),
		})
	}
	return lines
}

// checkLog checks that the log tells of no trouble, and of a shutdown that requests
// saw to their end; it returns how many.
func checkLog(log []proxytest.Line, problems *problems) (inFlight int) {
	var end []string
	for _, l := range log {
		if l.Text("level") != "INFO" {
			problems.add("the log has trouble: %.2000s", l.Raw)
		}
		switch {
		case len(end) == 0 && l.Message() != proxytest.MsgSIGTERM:
		case len(end) == 1 && l.Message() == proxytest.MsgRequestCompleted:
			inFlight++
		default:
			end = append(end, l.Message())
		}
	}
	if want := []string{proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete}; !slices.Equal(end, want) {
		problems.add("the log ends with %q and %d requests after the first of these, want %q", end, inFlight, want)
	}
	if inFlight == 0 {
		problems.add("no request was in flight at the end")
	}
	return inFlight
}

// How many of a thousand requests may be late before the run is worth nothing. The
// race detector makes the proxy so slow that uploads of 10 MiB come too late on a busy
// machine that never stood still.
const (
	lateShare     = 5
	lateShareRace = 30
)

// reconcile compares each request that was sent with its one log line.
func reconcile(o options, results []result, lines []logLine, seen func(int) int, stalls *pulse, problems *problems) (late int) {
	byNumber := map[int][]logLine{}
	for _, line := range lines {
		byNumber[line.number] = append(byNumber[line.number], line)
	}
	for _, r := range results {
		p := newPlan(o.seed, r.number)
		own := byNumber[r.number]
		delete(byNumber, r.number)
		switch {
		case !p.reaches() && len(own) == 0 && seen(r.number) == 0:
		case !p.reaches() || len(own) != 1:
			problems.add("%v: it has %d log lines, and reached the upstream %d times; the client: %v", p, len(own), seen(r.number), r)
		default:
			wrong, isLate := judge(p, r, seen(r.number), own[0], o.race || stalls.stalled(r.begun, r.ended))
			if len(wrong) > 0 {
				problems.add("%v: %s; the client: %v; the log: %v", p, strings.Join(wrong, "; "), r, own[0])
			}
			if isLate {
				late++
			}
		}
	}
	for _, number := range slices.Sorted(maps.Keys(byNumber)) {
		problems.add("the log has request %d, which nobody sent", number)
	}
	share := lateShare
	if o.race {
		share = lateShareRace
	}
	if late*1000 > len(lines)*share {
		problems.add("%d of %d requests were late: the machine is too busy, or the proxy too slow", late, len(lines))
	}
	return late
}

// judge says what is wrong with how p's request ended: the client got r, the
// upstream saw it seen times, and the log has the line. stalled says that the machine
// stood still meanwhile, late that the request ended as only then.
func judge(p plan, r result, seen int, line logLine, stalled bool) (wrong []string, late bool) {
	add := func(format string, args ...any) { wrong = append(wrong, fmt.Sprintf(format, args...)) }
	if !p.may(line, false) {
		if late = stalled && p.may(line, true); !late {
			add("it may end only as one of %v", faults[p.fault].ends)
		}
	}
	if line.method != p.method || r.proxyID != "" && r.proxyID != line.proxyID {
		add("the log has another method or id than the client")
	}
	if line.attempts > 0 && line.bytesIn != p.request.size {
		add("%d bytes came in, the client sent %d", line.bytesIn, p.request.size)
	}
	if cut := line.code == codeClientGone || line.code == codeTimeout || late; seen > line.attempts || seen < line.attempts && !cut {
		add("the upstream saw %d attempts, the log has %d", seen, line.attempts)
	}
	if difference := compare(p, r, seen, line); difference != "" {
		add("%s", difference)
	}
	return wrong, late
}

// compare returns what differs between the answer as the client and the log have it.
func compare(p plan, r result, seen int, line logLine) string {
	size := p.answer.size
	if p.method == http.MethodHead {
		size = 0
	}
	answered := line.upstreamID != ""
	switch {
	case answered && line.upstreamID != fmt.Sprint(upstreamID(p.number), seen):
		return "the log has the upstream's id of another request or attempt"
	case r.bytes > line.bytesOut && answered:
		return "the client got more than the proxy sent"
	case line.code == "" && line.bytesOut != size:
		return fmt.Sprintf("the log calls an answer of %d bytes complete, it has %d", line.bytesOut, size)
	case line.code == codeClientGone && !r.left:
		return "the log has the client gone, and it was not"
	case r.left:
		return "" // what it did not wait for can't be compared
	case r.status != line.status:
		return "the client got another status than the log has"
	case !answered && (!r.whole || p.method != http.MethodHead && r.code != line.code):
		return "the client got another error than the log has"
	case answered && r.whole != (line.code == ""):
		return "an answer that broke off looks whole, or a whole one broken"
	case answered && r.whole && r.bytes != size:
		return "a whole answer has another size"
	}
	return ""
}

// errorTypes are the codes that proxy_upstream_errors_total has.
var errorTypes = []string{codeTimeout, codeConnection, codeInvalid, codeRead, codeInternal}

// checkMetrics compares the metrics with the log, to the last request.
func checkMetrics(m proxytest.Metrics, lines []logLine, problems *problems) {
	check := func(want int, name string, labels ...string) {
		if got := m.Value(name, labels...); got != float64(want) {
			problems.add("%s%v is %v, the log has %d", name, labels, got, want)
		}
	}
	type series struct{ status, method string }
	requests, failed := map[series]int{}, map[string]int{}
	retries, answered := 0, 0
	for _, l := range lines {
		requests[series{fmt.Sprint(l.status), l.method}]++
		failed[l.code]++
		retries += max(0, l.attempts-1)
		if l.upstreamID != "" {
			answered++
		}
	}
	check(len(lines), "proxy_requests_total")
	for s, n := range requests {
		check(n, "proxy_requests_total", "status", s.status, "method", s.method)
	}
	for _, t := range errorTypes {
		check(failed[t], "proxy_upstream_errors_total", "error_type", t)
	}
	check(retries, "proxy_upstream_retries_total")
	check(answered, "proxy_time_to_first_byte_seconds")
	check(0, "proxy_requests_in_flight")
	check(0, "proxy_requests_queued")
	check(0, "proxy_buffered_body_bytes")
	checkDurations(m, lines, problems)
}

// checkDurations compares proxy_request_duration_seconds with the log, whose
// milliseconds are whole: a request that took as long as a bucket's bound may be on
// either side of it, and the sum is greater by up to a millisecond for each.
func checkDurations(m proxytest.Metrics, lines []logLine, problems *problems) {
	const name = "proxy_request_duration_seconds"
	byStatus := map[string][]int64{} // milliseconds
	for _, l := range lines {
		status := fmt.Sprint(l.status)
		byStatus[status] = append(byStatus[status], l.latency.Milliseconds())
	}
	if got := len(m[name].GetMetric()); got != len(byStatus) {
		problems.add("%s has %d statuses, the log has %d", name, got, len(byStatus))
	}
	for _, metric := range m[name].GetMetric() {
		status, histogram := metric.GetLabel()[0].GetValue(), metric.GetHistogram()
		own := byStatus[status]
		slices.Sort(own)
		check := func(what string, got, least, most float64) {
			if got < least-1e-6 || got > most+1e-6 {
				problems.add("%s of status %s: the %s is %v, the log has from %v to %v", name, status, what, got, least, most)
			}
		}
		n, sum := float64(len(own)), 0.0
		for _, ms := range own {
			sum += float64(ms) / 1e3
		}
		check("count", float64(histogram.GetSampleCount()), n, n)
		check("sum", histogram.GetSampleSum(), sum, sum+n/1e3)
		for _, bucket := range histogram.GetBucket() {
			least, most := n, n // up to infinity
			if bound := bucket.GetUpperBound(); !math.IsInf(bound, 1) {
				ms := int64(math.Round(bound * 1e3))
				below, _ := slices.BinarySearch(own, ms)
				upTo, _ := slices.BinarySearch(own, ms+1)
				least, most = float64(below), float64(upTo)
			}
			check(fmt.Sprintf("count up to %v s", bucket.GetUpperBound()), float64(bucket.GetCumulativeCount()), least, most)
		}
	}
}

// checkHealth compares /health with the log.
func checkHealth(p *proxytest.Proxy, lines []logLine, problems *problems) {
	var body struct {
		Status   string
		Requests int `json:"requests_served"`
		Errors   int `json:"errors_total"`
	}
	status, raw, err := p.Health()
	if err == nil {
		err = json.Unmarshal(raw, &body)
	}
	failed := 0
	for _, l := range lines {
		if slices.Contains(errorTypes, l.code) {
			failed++
		}
	}
	if err != nil || status != http.StatusOK || body.Status != "healthy" || body.Requests != len(lines) || body.Errors != failed {
		problems.add("/health has status %d, %s (%v), want healthy, %d requests and %d errors", status, raw, err, len(lines), failed)
	}
}
