package soak

import (
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
	sameRequest, sameAnswer := func(*http.Request) {}, func(*http.Response) {}
	other := find(t, func(p plan) bool { return p.fault == noFault && !p.chunked })
	for _, row := range []struct {
		name    string
		request func(r *http.Request)
		answer  func(r *http.Response)
		wrong   string
	}{
		{"none", sameRequest, sameAnswer, ""},
		{"a byte of the request", func(r *http.Request) { r.Body = change(r.Body, flip) }, sameAnswer, "with a wrong body"},
		{"a byte of the answer", sameRequest, func(r *http.Response) { r.Body = change(r.Body, flip) }, "a wrong byte"},
		{"a clean end too soon", sameRequest, func(r *http.Response) {
			r.Body = change(r.Body, func(b []byte) []byte { return b[:len(b)-1] })
			r.Header.Del("Content-Length")
		}, "Content-Length"},
		{"a header", sameRequest, func(r *http.Response) { r.Header.Del(numberHeader) }, numberHeader},
		{"decoded", sameRequest, func(r *http.Response) { r.Header.Set("Content-Encoding", "gzip") }, "Content-Encoding"},
		{"another request", func(r *http.Request) {
			r.URL.Path, r.ContentLength = fmt.Sprint(pathPrefix, other.number), other.request.size
			r.Body = io.NopCloser(bytes.NewReader(other.request.bytes()))
		}, sameAnswer, "another request"},
		{"no authorization", func(r *http.Request) { r.Header.Del("Authorization") }, sameAnswer, "the headers"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var found []string
			l := &lane{seed: testSeed, exchanges: map[int]*exchange{}}
			l.wrong = func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
			upstream := httptest.NewServer(l)
			defer upstream.Close()
			target, _ := url.Parse(upstream.URL)
			proxy := httptest.NewServer(&httputil.ReverseProxy{
				Transport: &http.Transport{DisableCompression: true},
				Rewrite: func(r *httputil.ProxyRequest) {
					r.SetURL(target)
					r.Out.Header.Set("Anthropic-Beta", "oauth-2025-04-20")
					row.request(r.Out)
				},
				ModifyResponse: func(r *http.Response) error {
					row.answer(r)
					return nil
				},
			})
			defer proxy.Close()
			c := &client{addr: proxy.Listener.Addr().String()}
			defer c.hangUp(plan{})
			p := find(t, func(p plan) bool {
				return p.kind == "small POST" && p.fault == noFault && p.declared && !p.chunked && p.number > other.number
			})
			if _, err := c.do(p); err != nil {
				found = append(found, err.Error())
			}
			checkFound(t, found, row.wrong)
		})
	}
}

// asPlanned is how p's request ends when all is as planned: in the first of its endings.
func asPlanned(p plan) exchange {
	e := p.ends[0]
	x := exchange{
		client: result{status: cmp.Or(e.status, p.status), proxyID: "req_1", whole: e.code != broken.code, left: e.code == gone.code,
			span: span{from: time.Now()}},
		log: []logLine{{number: p.number, RequestID: "req_1", Method: p.method, Status: cmp.Or(e.status, p.status), code: e.code,
			Attempts: e.attempts, Latency: e.least.Milliseconds(), BytesIn: p.request.size}},
		attempts: e.attempts,
	}
	if e.status != 0 {
		x.client.code = e.code
		return x
	}
	x.log[0].UpstreamID = fmt.Sprint(upstreamID(p.number), e.attempts)
	x.log[0].BytesOut, x.client.bytes = p.answer.size, p.answer.size
	return x
}

// TestJudge changes one thing at a time of requests that ended as planned.
func TestJudge(t *testing.T) {
	const (
		silent, reset         = "the upstream is silent before headers, twice", "the upstream resets before headers"
		breaks                = "the upstream breaks off in the answer"
		only, attempts, lines = "may end only", "number of attempts", "log lines"
	)
	again := func(x *exchange, l *logLine) {
		x.attempts, l.Attempts, l.Latency, l.UpstreamID = 2, 2, again.Milliseconds(), fmt.Sprint(upstreamID(l.number), 2)
	}
	for _, row := range []struct {
		name   string
		fault  string
		change func(x *exchange, l *logLine)
		wrong  string
		late   bool // and all right, if the machine stood still
	}{
		{"nobody sent it", noFault, func(x *exchange, l *logLine) { x.client = result{} }, "nobody", false},
		{"no line", noFault, func(x *exchange, _ *logLine) { x.log = nil }, lines, false},
		{"two lines", noFault, func(x *exchange, l *logLine) { x.log = append(x.log, *l) }, lines, false},
		{"another id", noFault, func(x *exchange, _ *logLine) { x.client.proxyID = "req_2" }, "method or id", false},
		{"another method", noFault, func(_ *exchange, l *logLine) { l.Method = "PUT" }, "method or id", false},
		{"another status in the log", noFault, func(_ *exchange, l *logLine) { l.Status = 201 }, only, false},
		{"another status at the client", noFault, func(x *exchange, _ *logLine) { x.client.status = 201 }, "another status", false},
		{"an attempt too many", noFault, func(x *exchange, _ *logLine) { x.attempts++ }, attempts, false},
		{"an attempt lost", noFault, func(x *exchange, _ *logLine) { x.attempts-- }, attempts, false},
		{"a byte lost on the way in", noFault, func(_ *exchange, l *logLine) { l.BytesIn-- }, "bytes in", false},
		{"a byte lost on the way out", noFault, func(x *exchange, _ *logLine) { x.client.bytes-- }, "another size", false},
		{"a byte not sent", noFault, func(x *exchange, l *logLine) { x.client.bytes--; l.BytesOut-- }, "complete that is not", false},
		{"a byte too many", noFault, func(x *exchange, _ *logLine) { x.client.bytes++ }, "more than the proxy sent", false},
		{"the answer to another request", noFault, func(_ *exchange, l *logLine) { l.UpstreamID = "up_99_1" }, "another request", false},
		{"a broken answer for a whole one", noFault, func(x *exchange, _ *logLine) { x.client.whole = false }, "or a whole one broken", false},
		{"gone without leaving", noFault, func(_ *exchange, l *logLine) { l.Status, l.code = 499, gone.code }, "it was not", false},
		{"tried again", noFault, again, only, true},
		{"tried again too soon", noFault, func(x *exchange, l *logLine) { again(x, l); l.Latency = timeout.Milliseconds() - 1 }, only, false},
		{"given up too soon", silent, func(_ *exchange, l *logLine) { l.Latency-- }, only, false},
		{"not tried again", silent, func(x *exchange, l *logLine) { x.attempts, l.Attempts = 1, 1 }, only, false},
		{"another error at the client", silent, func(x *exchange, _ *logLine) { x.client.code = refused.code }, "another error", false},
		{"sent twice, behind the log", reset, func(x *exchange, _ *logLine) { x.attempts = 2 }, attempts, false},
		{"a clean end", breaks, func(x *exchange, _ *logLine) { x.client.whole = true }, "looks whole", false},
		{"called complete", breaks, func(_ *exchange, l *logLine) { l.code = "" }, only, false},
		{"sent before it was whole", "the client leaves in its upload", func(x *exchange, _ *logLine) { x.attempts = 1 }, attempts, false},
		{"bad chunk sent on", "the client sends a bad chunk", func(x *exchange, l *logLine) { x.attempts, l.Attempts = 1, 1 }, only, false},
	} {
		t.Run(row.name, func(t *testing.T) {
			p := find(t, func(p plan) bool { return p.fault == row.fault })
			x := asPlanned(p)
			wrong, _ := judge(p, x, false)
			checkFound(t, wrong, "")
			row.change(&x, &x.log[0])
			wrong, _ = judge(p, x, false)
			checkFound(t, wrong, row.wrong)
			if _, late := judge(p, x, true); late != row.late {
				t.Errorf("on a machine that stood still, late: %v", late)
			}
		})
	}
}

// TestTrend: what grows is found in spite of its noise, and what only swings is not.
func TestTrend(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for _, row := range []struct {
		perHour, swings float64
		wrong           bool
	}{{0, 0, false}, {0, 10, false}, {1, 5, false}, {40, 0, true}, {80, 10, true}} {
		for _, q := range quantities {
			var samples []float64
			for second := range 1800 {
				samples = append(samples, 60+row.perHour*float64(second)/3600+row.swings*r.NormFloat64())
			}
			if trend := q.trend(samples); trend.exceeds(q) != row.wrong {
				t.Errorf("%s: %v is wrong: %v", q.name, trend, !row.wrong)
			}
		}
	}
}

func TestPlans(t *testing.T) {
	happened := map[string]bool{}
	for number := range 20_000 {
		p := newPlan(testSeed, number)
		happened[p.kind], happened[p.fault] = true, true
	}
	if all := len(kinds) + len(faults) + 1; len(happened) != all {
		t.Errorf("%d kinds and faults of %d happen", len(happened), all)
	}
}
