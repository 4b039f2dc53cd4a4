package main

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// find returns the first plan of a seed that fits.
func find(t *testing.T, fits func(plan) bool) plan {
	t.Helper()
	for number := range 100_000 {
		if p := newPlan(testSeed, number); fits(p) {
			return p
		}
	}
	t.Fatal("no plan fits")
	return plan{}
}

const testSeed = 5

// views are how everyone sees a request's end.
type views struct {
	client   result
	upstream int // attempts
	log      logLine
}

// ended returns how p's request ends when all is as planned: in the first of its
// endings.
func ended(p plan) views {
	e := faults[p.fault].ends[0]
	e.status = cmp.Or(e.status, p.status)
	line := logLine{
		number: p.number, proxyID: "req_1", method: p.method, status: e.status, code: e.code,
		attempts: e.attempts, latency: e.least.Truncate(time.Millisecond), bytesIn: p.request.size,
	}
	r := result{number: p.number, status: e.status, proxyID: "req_1", whole: true, left: e.code == codeClientGone}
	if e.code == "" || e.code == codeRead {
		line.upstreamID = fmt.Sprint(upstreamID(p.number), e.attempts)
		line.bytesOut, r.whole = p.answer.size, e.code == ""
		if p.method == http.MethodHead {
			line.bytesOut = 0
		}
		r.bytes = line.bytesOut
	} else {
		r.code = e.code
	}
	return views{r, e.attempts, line}
}

// TestJudge changes one thing at a time of requests that ended as planned.
func TestJudge(t *testing.T) {
	late := func(v *views) {
		v.upstream, v.log.attempts, v.log.latency, v.log.upstreamID = 2, 2, timeout+retryPause, fmt.Sprint(upstreamID(v.log.number), 2)
	}
	tests := []struct {
		name    string
		fault   fault
		stalled bool
		change  func(v *views)
		wrong   string // empty: nothing is
		late    bool
	}{
		{name: "as planned"},
		{name: "as planned, on a stalled machine", stalled: true},
		{name: "another id", wrong: "method or id", change: func(v *views) { v.client.proxyID = "req_2" }},
		{name: "another method", wrong: "method or id", change: func(v *views) { v.log.method = "PUT" }},
		{name: "another status in the log", wrong: "may end only", change: func(v *views) { v.log.status = 201 }},
		{name: "another status at the client", wrong: "another status", change: func(v *views) { v.client.status = 201 }},
		{name: "an attempt too many", wrong: "attempts", change: func(v *views) { v.upstream++ }},
		{name: "an attempt too many, and its answer", wrong: "attempts", change: func(v *views) { v.upstream, v.log.upstreamID = 2, fmt.Sprint(upstreamID(v.log.number), 2) }},
		{name: "an attempt lost", wrong: "attempts", change: func(v *views) { v.upstream-- }},
		{name: "a byte lost on the way in", wrong: "bytes came in", change: func(v *views) { v.log.bytesIn-- }},
		{name: "a byte lost on the way out", wrong: "another size", change: func(v *views) { v.client.bytes-- }},
		{name: "a byte not sent", wrong: "calls an answer", change: func(v *views) { v.client.bytes--; v.log.bytesOut-- }},
		{name: "a byte more than was sent", wrong: "more than the proxy sent", change: func(v *views) { v.client.bytes++ }},
		{name: "the answer to another request", wrong: "another request", change: func(v *views) { v.log.upstreamID = fmt.Sprint(upstreamID(99), 1) }},
		{name: "a broken answer for a whole one", wrong: "broke off looks whole", change: func(v *views) { v.client.whole = false }},
		{name: "gone without leaving", wrong: "it was not", change: func(v *views) { v.log.status, v.log.code = statusClientGone, codeClientGone }},
		{name: "slow machine", stalled: true, late: true, change: late},
		{name: "slow proxy", wrong: "may end only", change: late},
		{name: "retried too soon", stalled: true, wrong: "may end only", change: func(v *views) {
			late(v)
			v.log.latency = timeout - time.Millisecond
		}},

		{name: "silent, as planned", fault: upstreamSilent},
		{name: "given up too soon", fault: upstreamSilent, wrong: "may end only", change: func(v *views) { v.log.latency = again + timeout - time.Millisecond }},
		{name: "not retried", fault: upstreamSilent, wrong: "may end only", change: func(v *views) { v.upstream, v.log.attempts = 1, 1 }},
		{name: "another error at the client", fault: upstreamSilent, wrong: "another error", change: func(v *views) { v.client.code = codeConnection }},
		{name: "silent once, as planned", fault: upstreamSilentOnce},
		{name: "refused, as planned", fault: upstreamRefuses},
		{name: "retried after that", fault: upstreamRefuses, wrong: "may end only", change: func(v *views) { v.upstream, v.log.attempts = 2, 2 }},
		{name: "sent twice, behind the log", fault: upstreamRefuses, wrong: "attempts", change: func(v *views) { v.upstream = 2 }},
		{name: "broken off, as planned", fault: upstreamBreaksOff},
		{name: "a clean end", fault: upstreamBreaksOff, wrong: "looks whole", change: func(v *views) { v.client.whole = true }},
		{name: "called complete", fault: upstreamBreaksOff, wrong: "may end only", change: func(v *views) { v.log.code = "" }},
		{name: "left, as planned", fault: clientLeavesUploading},
		{name: "sent before it was whole", fault: clientLeavesUploading, wrong: "attempts", change: func(v *views) { v.upstream = 1 }},
		{name: "bad chunk, as planned", fault: clientSendsBadChunk},
		{name: "bad chunk sent on", fault: clientSendsBadChunk, wrong: "may end only", change: func(v *views) { v.upstream, v.log.attempts = 1, 1 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := find(t, func(p plan) bool { return p.fault == tt.fault && p.method == http.MethodPost })
			v := ended(p)
			if tt.change != nil {
				tt.change(&v)
			}
			wrong, late := judge(p, v.client, v.upstream, v.log, tt.stalled)
			if said := strings.Join(wrong, "; "); (said == "") != (tt.wrong == "") || !strings.Contains(said, tt.wrong) {
				t.Errorf("%v: %q is wrong, want %q", p, said, tt.wrong)
			}
			if late != tt.late {
				t.Errorf("late: %v, want %v", late, tt.late)
			}
		})
	}
}

// TestReconcile shows that a line too few and one too many are found.
func TestReconcile(t *testing.T) {
	reaching := find(t, func(p plan) bool { return p.reaches() && p.fault == noFault })
	refused := find(t, func(p plan) bool { return p.fault == clientSendsTwoLengths })
	v := ended(reaching)
	line := v.log
	stray := line
	stray.number = 4242
	forRefused := line
	forRefused.number = refused.number
	both := []result{v.client, {number: refused.number, status: 400, whole: true}}
	tests := []struct {
		name  string
		lines []logLine
		wrong string
	}{
		{name: "as planned", lines: []logLine{line}},
		{name: "a line is missing", wrong: "0 log lines"},
		{name: "two lines for one request", lines: []logLine{line, line}, wrong: "2 log lines"},
		{name: "a line for nobody", lines: []logLine{line, stray}, wrong: "request 4242, which nobody sent"},
		{name: "a line for a request that is refused before", lines: []logLine{line, forRefused}, wrong: "1 log lines"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var found problems
			seen := func(number int) int {
				if number == reaching.number {
					return 1
				}
				return 0
			}
			reconcile(options{seed: testSeed}, both, tt.lines, seen, &pulse{}, &found)
			checkFound(t, &found, tt.wrong)
		})
	}
}

// checkFound checks that one problem was found, and which; wrong is empty if there is
// to be none.
func checkFound(t *testing.T, found *problems, wrong string) {
	t.Helper()
	first, n := found.all()
	if wrong == "" && n > 0 || wrong != "" && (n != 1 || !strings.Contains(first[0], wrong)) {
		t.Errorf("%d problems, %q, want %q", n, first, wrong)
	}
}

// page is a metrics page of two requests, with one line replaced.
func page(t *testing.T, replace, by string) proxytest.Metrics {
	t.Helper()
	text := `# TYPE proxy_requests_total counter
proxy_requests_total{status="200",method="POST"} 1
proxy_requests_total{status="504",method="GET"} 1
# TYPE proxy_upstream_errors_total counter
proxy_upstream_errors_total{error_type="timeout"} 1
proxy_upstream_errors_total{error_type="connection"} 0
# TYPE proxy_upstream_retries_total counter
proxy_upstream_retries_total 1
# TYPE proxy_time_to_first_byte_seconds histogram
proxy_time_to_first_byte_seconds_bucket{le="+Inf"} 1
proxy_time_to_first_byte_seconds_sum 0.005
proxy_time_to_first_byte_seconds_count 1
# TYPE proxy_request_duration_seconds histogram
proxy_request_duration_seconds_bucket{status="200",le="0.005"} 0
proxy_request_duration_seconds_bucket{status="200",le="0.01"} 1
proxy_request_duration_seconds_bucket{status="200",le="+Inf"} 1
proxy_request_duration_seconds_sum{status="200"} 0.0055
proxy_request_duration_seconds_count{status="200"} 1
proxy_request_duration_seconds_bucket{status="504",le="0.005"} 0
proxy_request_duration_seconds_bucket{status="504",le="0.01"} 0
proxy_request_duration_seconds_bucket{status="504",le="+Inf"} 1
proxy_request_duration_seconds_sum{status="504"} 4.1
proxy_request_duration_seconds_count{status="504"} 1
# TYPE proxy_requests_in_flight gauge
proxy_requests_in_flight 0
# TYPE proxy_requests_queued gauge
proxy_requests_queued 0
# TYPE proxy_buffered_body_bytes gauge
proxy_buffered_body_bytes 0
`
	if replace != "" && strings.Count(text, replace+"\n") != 1 {
		t.Fatalf("the page has no line %q", replace)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(strings.Replace(text, replace+"\n", by+"\n", 1)))
	if err != nil {
		t.Fatal(err)
	}
	return families
}

// TestCheckMetrics changes one figure at a time of metrics that agree with the log.
func TestCheckMetrics(t *testing.T) {
	lines := []logLine{
		{status: 200, method: "POST", attempts: 1, upstreamID: "up_1_1", latency: 5 * time.Millisecond},
		{status: 504, method: "GET", code: codeTimeout, attempts: 2, latency: 4100 * time.Millisecond},
	}
	const (
		requests = "proxy_requests_total"
		errors   = "proxy_upstream_errors_total"
		duration = "proxy_request_duration_seconds"
	)
	tests := []struct{ replace, by, wrong string }{
		{},
		{requests + `{status="504",method="GET"} 1`, requests + `{status="504",method="PUT"} 1`, requests + "[status 504 method GET]"},
		{errors + `{error_type="timeout"} 1`, errors + `{error_type="timeout"} 2`, errors + "[error_type timeout]"},
		{errors + `{error_type="connection"} 0`, errors + `{error_type="connection"} 1`, errors + "[error_type connection]"},
		{`proxy_upstream_retries_total 1`, `proxy_upstream_retries_total 2`, "proxy_upstream_retries_total"},
		{`proxy_time_to_first_byte_seconds_count 1`, `proxy_time_to_first_byte_seconds_count 2`, "proxy_time_to_first_byte_seconds"},
		{duration + `_bucket{status="200",le="0.01"} 1`, duration + `_bucket{status="200",le="0.01"} 0`, "up to 0.01 s is 0"},
		{duration + `_bucket{status="504",le="0.01"} 0`, duration + `_bucket{status="504",le="0.01"} 1`, "up to 0.01 s is 1"},
		{duration + `_sum{status="200"} 0.0055`, duration + `_sum{status="200"} 0.0075`, "the sum is 0.0075"},
		{duration + `_count{status="504"} 1`, duration + `_count{status="504"} 0`, "of status 504: the count is 0"},
		{`proxy_requests_in_flight 0`, `proxy_requests_in_flight 1`, "proxy_requests_in_flight"},
		{`proxy_requests_queued 0`, `proxy_requests_queued 1`, "proxy_requests_queued"},
		{`proxy_buffered_body_bytes 0`, `proxy_buffered_body_bytes 1`, "proxy_buffered_body_bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.by, func(t *testing.T) {
			var found problems
			checkMetrics(page(t, tt.replace, tt.by), lines, &found)
			checkFound(t, &found, tt.wrong)
		})
	}
}

// TestFlat: what grows is found in spite of its noise, and what only swings is not.
func TestFlat(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for name, row := range map[string]struct {
		perHour float64 // of goroutines, which are 100 at the start
		swings  float64
		found   bool
	}{
		"flat": {}, "swings": {swings: 30}, "one an hour": {perHour: 1, swings: 5},
		"grows": {perHour: 40, found: true}, "grows and swings": {perHour: 100, swings: 30, found: true},
	} {
		var samples []sample
		for at := time.Duration(0); at < 30*time.Minute; at += sampleEvery {
			samples = append(samples, sample{at: at, goroutines: 100 + row.perHour*at.Hours() + row.swings*r.NormFloat64()})
		}
		var found problems
		if checkFlat(options{duration: 30 * time.Minute}, samples, &found); (found.count > 0) != row.found {
			t.Errorf("%s: %q", name, found.first)
		}
	}
}

// TestChecker: every kind of damage to a body is found.
func TestChecker(t *testing.T) {
	c := content{binaryForm, 7, 10_000}
	right := c.bytes()
	flipped := bytes.Clone(right)
	flipped[9_999] ^= 1
	for name, row := range map[string]struct {
		body  []byte
		sum   string
		whole bool
	}{
		"whole": {right, digest(right), true}, "a beginning": {right[:9_999], digest(right), false}, "another checksum": {right, digest(flipped), false},
		"last byte": {flipped, digest(right), false}, "a byte too many": {append(bytes.Clone(right), 0), digest(right), false},
		"a byte left out": {slices.Delete(bytes.Clone(right), 4_000, 4_001), digest(right), false},
	} {
		got := &checker{want: right}
		for piece := range slices.Chunk(row.body, 333) {
			got.Write(piece)
		}
		if err := got.whole(row.sum); (err == nil) != row.whole {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPlans: all kinds and faults happen, and a number stands for the same request each time.
func TestPlans(t *testing.T) {
	const enough = 20_000
	happened, ofKind := map[fault]bool{}, map[kind]bool{}
	for number := range enough {
		p := newPlan(testSeed, number)
		if again := newPlan(testSeed, number); again != p {
			t.Fatalf("request %d is %+v, and then %+v", number, p, again)
		}
		happened[p.fault], ofKind[p.kind] = true, true
	}
	if len(happened) != len(faults) || len(ofKind) != len(kinds) {
		t.Errorf("of %d requests %d kinds and %d faults happen, want %d and %d", enough, len(ofKind), len(happened), len(kinds), len(faults))
	}
}
