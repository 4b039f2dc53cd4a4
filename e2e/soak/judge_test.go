package main

import (
	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

const testSeed = 5

// find returns the first plan of a POST that fits.
func find(t *testing.T, fits func(plan) bool) plan {
	t.Helper()
	for number := range 100_000 {
		if p := newPlan(testSeed, number); p.method == http.MethodPost && fits(p) {
			return p
		}
	}
	t.Fatal("no plan fits")
	return plan{}
}

// checkFound checks that a problem was found, and which; wrong is empty if there is to be none.
func checkFound(t *testing.T, found []string, wrong string) {
	t.Helper()
	if said := strings.Join(found, "; "); (said == "") != (wrong == "") || !strings.Contains(said, wrong) {
		t.Errorf("found %q, want %q", said, wrong)
	}
}

// TestWrongBytes puts proxies that do harm between client and upstream.
func TestWrongBytes(t *testing.T) {
	change := func(body io.Reader, change func([]byte) []byte) io.ReadCloser {
		all, _ := io.ReadAll(body)
		return io.NopCloser(bytes.NewReader(change(all)))
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	other := find(t, func(p plan) bool { return p.fault == noFault && !p.chunked })
	for name, row := range map[string]struct {
		request func(r *httputil.ProxyRequest)
		answer  func(r *http.Response)
		wrong   string
	}{
		"none":                  {},
		"a byte of the request": {request: func(r *httputil.ProxyRequest) { r.Out.Body = change(r.In.Body, flip) }, wrong: "with a wrong body"},
		"a byte of the answer":  {answer: func(r *http.Response) { r.Body = change(r.Body, flip) }, wrong: "a wrong byte"},
		"a clean end too soon": {answer: func(r *http.Response) {
			r.Body = change(r.Body, func(b []byte) []byte { return b[1:] })
			r.Header.Del("Content-Length")
		}, wrong: "Content-Length"},
		"a checksum": {answer: func(r *http.Response) { r.Header.Set(digestHeader, "0") }, wrong: digestHeader},
		"decoded":    {answer: func(r *http.Response) { r.Header.Set("Content-Encoding", "gzip") }, wrong: "Content-Encoding"},
		"another request": {request: func(r *httputil.ProxyRequest) {
			r.Out.URL.Path, r.Out.ContentLength = other.path, other.request.size
			r.Out.Body = io.NopCloser(bytes.NewReader(other.request.bytes()))
			r.Out.Header.Set(digestHeader, digest(other.request.bytes()))
		}, wrong: "another request"},
		"no authorization": {request: func(r *httputil.ProxyRequest) { r.Out.Header.Del("Authorization") }, wrong: "the headers"},
	} {
		t.Run(name, func(t *testing.T) {
			var found problems
			up, err := startUpstream(fakeanthropic.Plaintext, testSeed, &found)
			if err != nil {
				t.Fatal(err)
			}
			defer up.Close()
			target, _ := url.Parse(up.URL)
			proxy := httptest.NewServer(&httputil.ReverseProxy{
				Transport: &http.Transport{DisableCompression: true},
				Rewrite: func(r *httputil.ProxyRequest) {
					r.SetURL(target)
					r.Out.Header.Set("Anthropic-Beta", "oauth-2025-04-20")
					if row.request != nil {
						row.request(r)
					}
				},
				ModifyResponse: func(r *http.Response) error {
					if row.answer != nil {
						row.answer(r)
					}
					return nil
				},
			})
			defer proxy.Close()
			c := &client{addr: proxy.Listener.Addr().String()}
			defer c.hangUp()
			p := find(t, func(p plan) bool {
				return p.kind == "small POST" && p.fault == noFault && p.declared && !p.chunked && p.number > other.number
			})
			if _, err := c.do(p); err != nil {
				found.add("%v", err)
			}
			checkFound(t, found.all(), row.wrong)
		})
	}
}

// views are how everyone sees a request's end.
type views struct {
	client   result
	upstream int // attempts
	log      logLine
}

// ended returns how p's request ends when all is as planned: in the first of its endings.
func ended(p plan) views {
	e := p.ends[0]
	v := views{
		client: result{number: p.number, status: cmp.Or(e.status, p.status), proxyID: "req_1", whole: e.code != codeRead, left: e.code == codeClientGone},
		log: logLine{number: p.number, RequestID: "req_1", Method: p.method, Status: cmp.Or(e.status, p.status), code: e.code,
			Attempts: e.attempts, Latency: e.least.Milliseconds(), BytesIn: p.request.size},
		upstream: e.attempts,
	}
	if e.status != 0 {
		v.client.code = e.code
		return v
	}
	v.log.UpstreamID = fmt.Sprint(upstreamID(p.number), e.attempts)
	v.log.BytesOut, v.client.bytes = p.answer.size, p.answer.size
	return v
}

// TestJudge changes one thing at a time of requests that ended as planned.
func TestJudge(t *testing.T) {
	const silent, only, attempts = "the upstream is silent before headers, twice", "may end only", "the upstream saw"
	again := func(v *views) {
		v.upstream, v.log.Attempts, v.log.Latency, v.log.UpstreamID = 2, 2, again.Milliseconds(), fmt.Sprint(upstreamID(v.log.number), 2)
	}
	for _, row := range []struct {
		name    string
		fault   fault
		change  func(v *views)
		wrong   string // empty: nothing is
		stalled bool   // if it is, nothing is wrong, and the request late
	}{
		{"another id", noFault, func(v *views) { v.client.proxyID = "req_2" }, "method or id", false},
		{"another method", noFault, func(v *views) { v.log.Method = "PUT" }, "method or id", false},
		{"another status in the log", noFault, func(v *views) { v.log.Status = 201 }, only, false},
		{"another status at the client", noFault, func(v *views) { v.client.status = 201 }, "another status", false},
		{"an attempt too many", noFault, func(v *views) { v.upstream++ }, attempts, false},
		{"an attempt lost", noFault, func(v *views) { v.upstream-- }, attempts, false},
		{"a byte lost on the way in", noFault, func(v *views) { v.log.BytesIn-- }, "bytes in", false},
		{"a byte lost on the way out", noFault, func(v *views) { v.client.bytes-- }, "another size", false},
		{"a byte not sent", noFault, func(v *views) { v.client.bytes--; v.log.BytesOut-- }, "complete that is not", false},
		{"a byte too many", noFault, func(v *views) { v.client.bytes++ }, "more than the proxy sent", false},
		{"the answer to another request", noFault, func(v *views) { v.log.UpstreamID = "up_99_1" }, "another request", false},
		{"a broken answer for a whole one", noFault, func(v *views) { v.client.whole = false }, "or a whole one broken", false},
		{"gone without leaving", noFault, func(v *views) { v.log.Status, v.log.code = 499, codeClientGone }, "it was not", false},
		{"tried again", noFault, again, only, true},
		{"tried again too soon", noFault, func(v *views) { again(v); v.log.Latency = timeout.Milliseconds() - 1 }, only, false},
		{"given up too soon", silent, func(v *views) { v.log.Latency-- }, only, false},
		{"not tried again", silent, func(v *views) { v.upstream, v.log.Attempts = 1, 1 }, only, false},
		{"another error at the client", silent, func(v *views) { v.client.code = codeConnection }, "another error", false},
		{"sent twice, behind the log", upstreamRefuses, func(v *views) { v.upstream = 2 }, attempts, false},
		{"a clean end", upstreamBreaksOff, func(v *views) { v.client.whole = true }, "looks whole", false},
		{"called complete", upstreamBreaksOff, func(v *views) { v.log.code = "" }, only, false},
		{"sent before it was whole", clientLeavesUploading, func(v *views) { v.upstream = 1 }, attempts, false},
		{"bad chunk sent on", clientSendsBadChunk, func(v *views) { v.upstream, v.log.Attempts = 1, 1 }, only, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := find(t, func(p plan) bool { return p.fault == row.fault })
			v := ended(p)
			wrong, _ := judge(p, v.client, v.upstream, v.log, false)
			checkFound(t, wrong, "")
			row.change(&v)
			wrong, _ = judge(p, v.client, v.upstream, v.log, false)
			checkFound(t, wrong, row.wrong)
			if _, late := judge(p, v.client, v.upstream, v.log, true); late != row.stalled {
				t.Errorf("on a machine that stood still, late: %v", late)
			}
		})
	}
}

// TestReconcile: each request has one line in the log, but for those that net/http refuses.
func TestReconcile(t *testing.T) {
	v := ended(find(t, func(p plan) bool { return p.fault == noFault }))
	refused := result{number: find(t, func(p plan) bool { return p.fault == clientSendsTwoLengths }).number}
	stray, forRefused := v.log, v.log
	stray.number, forRefused.number = 4242, refused.number
	for wrong, lines := range map[string][]logLine{
		"": {v.log}, "0 log lines": {}, "2 log lines": {v.log, v.log}, "which nobody sent": {v.log, stray}, "it has 1 log lines": {v.log, forRefused},
	} {
		var found problems
		seen := func(number int) int { return map[int]int{v.log.number: 1}[number] }
		reconcile(options{seed: testSeed}, []result{v.client, refused}, lines, seen, &pulse{}, &found)
		checkFound(t, found.all(), wrong)
	}
}

// page has the metrics of two requests.
const page = `# TYPE proxy_requests_total counter
proxy_requests_total{status="200",method="POST"} 1
proxy_requests_total{status="504",method="GET"} 1
# TYPE proxy_upstream_errors_total counter
proxy_upstream_errors_total{error_type="timeout"} 1
# TYPE proxy_upstream_retries_total counter
proxy_upstream_retries_total 1
# TYPE proxy_time_to_first_byte_seconds histogram
proxy_time_to_first_byte_seconds_count 1
# TYPE proxy_request_duration_seconds histogram
proxy_request_duration_seconds_bucket{status="200",le="0.01"} 1
proxy_request_duration_seconds_sum{status="200"} 0.0055
proxy_request_duration_seconds_count{status="200"} 1
proxy_request_duration_seconds_bucket{status="504",le="0.01"} 0
proxy_request_duration_seconds_sum{status="504"} 4.1
proxy_request_duration_seconds_count{status="504"} 1
# TYPE proxy_requests_in_flight gauge
proxy_requests_in_flight 0
# TYPE proxy_requests_queued gauge
proxy_requests_queued 0
# TYPE proxy_buffered_body_bytes gauge
proxy_buffered_body_bytes 0
`

// TestCheckMetrics changes each figure of metrics that agree with the log.
func TestCheckMetrics(t *testing.T) {
	lines := []logLine{
		{Status: 200, Method: "POST", Attempts: 1, UpstreamID: "up_1_1", Latency: 5},
		{Status: 504, Method: "GET", code: codeTimeout, Attempts: 2, Latency: 4100},
	}
	check := func(text string) []string {
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		var found problems
		checkMetrics(families, lines, &found)
		return found.all()
	}
	checkFound(t, check(page), "")
	for line := range strings.Lines(page) {
		series, _, _ := strings.Cut(line, " ")
		if series == "#" {
			continue
		}
		name, _, _ := strings.Cut(series, "{")
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, suffix)
		}
		checkFound(t, check(strings.Replace(page, line, series+" 7\n", 1)), name)
	}
	checkFound(t, check(strings.Replace(page, `method="GET"`, `method="PUT"`, 1)), "proxy_requests_total")
}

// TestFlat: what grows is found in spite of its noise, and what only swings is not.
func TestFlat(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, row := range []struct {
		perHour, swings float64
		grows           bool
	}{{0, 0, false}, {0, 10, false}, {1, 5, false}, {40, 0, true}, {80, 10, true}} {
		for i, q := range quantities {
			var samples []sample
			for at := time.Duration(0); at < 30*time.Minute; at += sampleEvery {
				s := sample{at: at}
				s.values[i] = 100 + row.perHour*at.Hours() + row.swings*r.NormFloat64()
				samples = append(samples, s)
			}
			var found problems
			checkFlat(options{duration: 30 * time.Minute}, samples, &found)
			want := ""
			if row.grows {
				want = "growth of " + q.name
			}
			checkFound(t, found.all(), want)
		}
	}
}

// TestPlans: all kinds and faults happen.
func TestPlans(t *testing.T) {
	happened := map[string]bool{}
	for number := range 20_000 {
		p := newPlan(testSeed, number)
		happened[p.kind], happened[string(p.fault)] = true, true
	}
	if all := len(kinds) + len(faults) + 1; len(happened) != all {
		t.Errorf("%d kinds and faults of %d happen", len(happened), all)
	}
}
