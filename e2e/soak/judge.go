package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// verify checks, after the traffic, that everything adds up, that nothing is left, and that the proxy ends in an orderly way.
func (l *lane) verify(stalls *pulse) {
	var m proxytest.Metrics
	if err := proxytest.Poll(func() (wrong string) { // clients that left did not wait for the end, and the log is written behind
		var err error
		if m, err = l.proxy.Metrics(); err != nil {
			return err.Error()
		}
		l.lines = completed(l.proxy.Logs(), &problems{}) // it is read again in the end
		if at, all := m.Value("proxy_requests_in_flight"), m.Value("proxy_requests_total"); at > 0 || all != float64(len(l.lines)) {
			return fmt.Sprintf("%v requests at work, %v in the metrics, %d in the log", at, all, len(l.lines))
		}
		return ""
	}); err != nil {
		l.problems.add("after the traffic: %v", err)
		return
	}
	checkMetrics(m, l.lines, &l.problems)
	checkHealth(l.proxy, l.lines, &l.problems)
	l.checkRest()
	checkFlat(l.options, l.samples, &l.problems)
	l.end()
	l.atEnd = checkLog(l.proxy.Logs(), &l.problems)
	l.lines = completed(l.proxy.Logs(), &l.problems)
	l.late = reconcile(l.options, l.results, l.lines, l.upstream.seen, stalls, &l.problems)
}

// A logLine is a "request completed" of the proxy's log.
type logLine struct {
	RequestID  string `json:"request_id"`
	Method     string
	Path       string
	Status     int
	Error      string
	Attempts   int
	UpstreamID string `json:"upstream_request_id"`
	Latency    int64  `json:"latency_ms"` // whole milliseconds
	BytesIn    int64  `json:"bytes_in"`
	BytesOut   int64  `json:"bytes_out"`

	number int    // in the path
	code   string // that the error begins with
}

// completed returns the lines of requests.
func completed(log []proxytest.Line, problems *problems) (lines []logLine) {
	for _, l := range log {
		if l.Message() != proxytest.MsgRequestCompleted {
			continue
		}
		var line logLine
		err := json.Unmarshal([]byte(l.Raw), &line)
		if err == nil {
			line.number, err = numberOf(line.Path)
		}
		if err != nil {
			problems.add("the log has a line that is not of the traffic: %v: %.300s", err, l.Raw)
			continue
		}
		code, why, _ := strings.Cut(line.Error, ": ")
		if line.code = code; code == codeClientGone && why == "the client stopped reading the answer" {
			line.code = codeSlowReader
		}
		lines = append(lines, line)
	}
	return lines
}

// checkLog checks that the log tells of no trouble, and of a shutdown that requests saw to their end; it returns how many.
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
	want := []string{proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete}
	if !slices.Equal(end, want) || inFlight == 0 {
		problems.add("the log ends with %q and %d requests after the first of these, want some, and %q", end, inFlight, want)
	}
	return inFlight
}

// How many of a thousand requests may be late before the run is worth nothing. The race detector makes the proxy so slow that uploads
// of 10 MiB come too late on a busy machine that never stood still.
const (
	lateShare     = 5
	lateShareRace = 30
)

// reconcile compares each request that was sent with its one log line, and returns how many were late.
func reconcile(o options, results []result, lines []logLine, seen func(int) int, stalls *pulse, problems *problems) (late int) {
	byNumber := map[int][]logLine{}
	for _, line := range lines {
		byNumber[line.number] = append(byNumber[line.number], line)
	}
	for _, r := range results {
		p, own, attempts := newPlan(o.seed, r.number), byNumber[r.number], seen(r.number)
		delete(byNumber, r.number)
		switch {
		case len(p.ends) == 0 && len(own) == 0 && attempts == 0:
		case len(p.ends) == 0 || len(own) != 1:
			problems.add("%v: it has %d log lines, and reached the upstream %d times; the client: %v", p, len(own), attempts, r)
		default:
			wrong, isLate := judge(p, r, attempts, own[0], o.race || stalls.stalled(r.begun, r.ended))
			if isLate {
				late++
			}
			if len(wrong) > 0 {
				problems.add("%v: %s; the client: %v; the log: %+v", p, strings.Join(wrong, "; "), r, own[0])
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

// judge says what is wrong with how p's request ended: the client got r, the upstream saw it seen times, and the log has the line.
// stalled says that the machine stood still meanwhile, late that the request ended as only then.
func judge(p plan, r result, seen int, line logLine, stalled bool) (wrong []string, late bool) {
	planned := p.may(line, false)
	late = !planned && stalled && p.may(line, true)
	size := p.answer.size
	if p.method == http.MethodHead {
		size = 0
	}
	answered, complete, stayed := line.UpstreamID != "", line.code == "", !r.left
	unseen := late || line.code == codeClientGone || line.code == codeTimeout // is an attempt that was given up on its way, perhaps
	for _, check := range []struct {
		wrong bool
		what  string
	}{
		{!planned && !late, fmt.Sprintf("it may end only as one of %+v", p.ends)},
		{line.Method != p.method || r.proxyID != "" && r.proxyID != line.RequestID, "the log has another method or id than the client"},
		{line.Attempts > 0 && line.BytesIn != p.request.size, "the log has another number of bytes in than the client sent"},
		{seen > line.Attempts || seen < line.Attempts && !unseen, fmt.Sprintf("the upstream saw %d attempts", seen)},
		{answered && line.UpstreamID != fmt.Sprint(upstreamID(p.number), seen), "the log has the upstream's id of another request or attempt"},
		{answered && r.bytes > line.BytesOut, "the client got more than the proxy sent"},
		{complete && line.BytesOut != size, "the log calls an answer complete that is not"},
		{line.code == codeClientGone && stayed, "the log has the client gone, and it was not"},
		{stayed && r.status != line.Status, "the client got another status than the log has"},
		{stayed && !answered && (!r.whole || p.method != http.MethodHead && r.code != line.code), "the client got another error than the log has"},
		{stayed && answered && r.whole != complete, "an answer that broke off looks whole, or a whole one broken"},
		{stayed && answered && r.whole && r.bytes != size, "a whole answer has another size"},
	} {
		if check.wrong {
			wrong = append(wrong, check.what)
		}
	}
	return wrong, late
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
		requests[series{fmt.Sprint(l.Status), l.Method}]++
		failed[l.code]++
		retries += max(0, l.Attempts-1)
		if l.UpstreamID != "" {
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

// checkDurations compares proxy_request_duration_seconds with the log, whose milliseconds are whole: a request that took as long as a
// bucket's bound may be on either side of it, and the sum is greater by up to a millisecond for each.
func checkDurations(m proxytest.Metrics, lines []logLine, problems *problems) {
	const name = "proxy_request_duration_seconds"
	byStatus := map[string][]float64{} // seconds
	for _, l := range lines {
		status := fmt.Sprint(l.Status)
		byStatus[status] = append(byStatus[status], float64(l.Latency)/1e3)
	}
	if got := len(m[name].GetMetric()); got != len(byStatus) {
		problems.add("%s has %d statuses, the log has %d", name, got, len(byStatus))
	}
	for _, metric := range m[name].GetMetric() {
		status, histogram := metric.GetLabel()[0].GetValue(), metric.GetHistogram()
		own := byStatus[status]
		if histogram.GetSampleCount() != uint64(len(own)) {
			problems.add("%s of status %s: the count is %d, the log has %d", name, status, histogram.GetSampleCount(), len(own))
		}
		sum := 0.0
		for _, seconds := range own {
			sum += seconds
		}
		if s := histogram.GetSampleSum(); s < sum-1e-6 || s > sum+float64(len(own))/1e3+1e-6 {
			problems.add("%s of status %s: the sum is %v, the log has %v and up to 1 ms more for each of %d", name, status, s, sum, len(own))
		}
		for _, bucket := range histogram.GetBucket() {
			n, bound := int(bucket.GetCumulativeCount()), bucket.GetUpperBound()
			below := countFunc(own, func(seconds float64) bool { return seconds < bound })
			if upTo := countFunc(own, func(seconds float64) bool { return seconds <= bound }); n < below || n > upTo {
				problems.add("%s of status %s: the count up to %v s is %d, the log has from %d to %d", name, status, bound, n, below, upTo)
			}
		}
	}
}

func countFunc[T any](all []T, is func(T) bool) (n int) {
	for _, one := range all {
		if is(one) {
			n++
		}
	}
	return n
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
	failed := countFunc(lines, func(l logLine) bool { return slices.Contains(errorTypes, l.code) })
	if err != nil || status != http.StatusOK || body.Status != "healthy" || body.Requests != len(lines) || body.Errors != failed {
		problems.add("/health has status %d, %s (%v), want healthy, %d requests and %d errors", status, raw, err, len(lines), failed)
	}
}
