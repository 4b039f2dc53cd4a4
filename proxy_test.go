package main

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestStream: each byte of an answer comes at its time. One that falls silent is cut exactly timeout_secs after its last byte;
// neither this nor one that breaks off can be taken for a complete one.
func TestStream(t *testing.T) {
	const minute, silent = time.Minute, "response_read: the upstream fell silent for 1m0s"
	whole, breaks, silence := func(*http.Request) {}, func(*http.Request) { panic(http.ErrAbortHandler) }, func(r *http.Request) { <-r.Context().Done() }
	type row struct {
		pauses   []time.Duration // before each byte
		declared bool            // its length
		end      func(r *http.Request)
		took     time.Duration
		err      any // in the log, if it is cut
	}
	inBubbles(t, map[string]row{
		"whole":                      {pauses: slices.Repeat([]time.Duration{minute / 2}, 10), end: whole, took: 5 * minute},
		"breaks off":                 {pauses: []time.Duration{0}, end: breaks, err: "response_read: unexpected EOF"},
		"silent from the start":      {took: minute, end: silence, err: silent},
		"silent after several bytes": {pauses: []time.Duration{time.Second, 59 * time.Second, minute / 2}, took: 150 * time.Second, end: silence, err: silent},
		"nearly silent before":       {pauses: []time.Duration{minute - 1, minute - 1}, took: 3*minute - 2, end: silence, err: silent},
		"silent, of declared length": {pauses: []time.Duration{10 * time.Second}, declared: true, took: 70 * time.Second, end: silence, err: silent},
	}, func(t *testing.T, row row) {
		var sent []time.Duration // when each byte was
		start := time.Now()
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			if row.declared {
				w.Header().Set("Content-Length", "100")
			}
			control := http.NewResponseController(w)
			control.Flush()
			for _, pause := range row.pauses {
				time.Sleep(pause)
				sent = append(sent, time.Since(start))
				io.WriteString(w, "x")
				control.Flush()
			}
			row.end(r)
		})
		got := r.do("GET", "/", "")
		got.expect(t, fmt.Sprint(map[bool]string{true: "200", false: "cut"}[row.err == nil], " after ", row.took))
		equal(t, "when the bytes came", got.came, sent)
		r.expectErrors(map[bool][]errorType{false: {typeResponseRead}}[row.err == nil]...)
		r.completed().expect(t, "error", row.err, "status", 200.0, "latency_ms", float64(row.took.Milliseconds()), "bytes_out", float64(len(row.pauses)))
	})
}

// TestSlowReader: the time in which the client does not read is no silence of the upstream, but a client that
// reads nothing for timeout_secs is given up.
func TestSlowReader(t *testing.T) {
	inBubbles(t, map[string]time.Duration{"in time": 59 * time.Second, "too late": 68 * time.Second}, func(t *testing.T, pause time.Duration) {
		const size = 3 * bulkBuffer
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/small" {
				w.Write(make([]byte, size))
			}
		})
		r.client.ReadBufferSize = 1 // nothing is read ahead
		r.do("GET", "/small", "")   // after an answer net/http takes the connection's deadline away
		resp, err := r.client.RoundTrip(must(http.NewRequest("GET", "http://proxy/", nil)))
		n, buf := 0, make([]byte, bulkBuffer) // what the proxy writes at a time
		for err == nil {
			time.Sleep(pause)
			var m int
			m, err = io.ReadFull(resp.Body, buf)
			n += m
		}
		r.expectErrors()
		whole, line := n == size && err == io.EOF, r.log.lines(t, "request completed")[1]
		equal(t, "it is whole", whole, pause < time.Minute)
		if whole {
			line.expect(t, "status", 200.0)
		} else {
			line.expect(t, "status", 499.0, "latency_ms", 67_500.0) // nine eighths of timeout_secs
		}
	})
}

// TestClientLeaves: at whatever moment, its request is cancelled upstream at once, counted as 499 and as no error.
func TestClientLeaves(t *testing.T) {
	inBubbles(t, map[string]string{"before the headers": "none after 7s", "in the middle of the answer": "cut after 7s"}, func(t *testing.T, want string) {
		var cancelled time.Time
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if want == "cut after 7s" {
				http.NewResponseController(w).Flush()
			}
			<-r.Context().Done()
			cancelled = time.Now()
		})
		start := time.Now()
		r.doFor(7*time.Second, "POST", "/", "x").expect(t, want)
		r.completed().expect(t, "status", 499.0, "latency_ms", 7000.0, "error", "client_gone: the client left")
		equal(t, "cancelled upstream after", cancelled.Sub(start), 7*time.Second)
		r.expectErrors()
	})
}

// TestQueue: requests beyond max_connections wait in arrival order, and one that leaves frees its place in line.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var served []string // one at a time
		r := newRig(t, "max_connections = 1", func(w http.ResponseWriter, r *http.Request) {
			served = append(served, r.URL.Path)
			io.Copy(io.Discard, r.Body)
			time.Sleep(10 * time.Second)
		})
		var wg sync.WaitGroup
		for i, want := range []string{"200 after 10s", "200 after 20s", "none after 5s", "200 after 30s"} {
			patience := time.Hour
			if i == 2 {
				patience = 5 * time.Second
			}
			wg.Go(func() { r.doFor(patience, "GET", fmt.Sprint("/", i), "").expect(t, want) })
			synctest.Wait() // one after the other
		}
		wg.Wait()
		synctest.Wait()
		equal(t, "served", served, []string{"/0", "/1", "/3"})
		for _, line := range r.log.lines(t, "request completed") { // the wait is part of the latency
			line.expect(t, "latency_ms", map[any]float64{"/0": 10_000, "/1": 20_000, "/2": 5_000, "/3": 30_000}[line["path"]])
		}
		equal(t, "the sum of durations", samplesOf(t, r.proxy.metrics.page())[`proxy_request_duration_seconds_sum{status="200"}`], 60)
	})
}

// panicky is a request's body and an answer's writer that panic.
type panicky struct {
	io.Closer
	http.ResponseWriter
}

func (panicky) Read([]byte) (int, error)      { panic("boom") }
func (panicky) Write([]byte) (int, error)     { panic("boom") }
func (p panicky) Unwrap() http.ResponseWriter { return p.ResponseWriter }

// TestPanic: a bug is a 500 of type internal, or a broken answer if that has begun; the proxy goes on.
func TestPanic(t *testing.T) {
	const broken = "cut after 0s"
	inBubbles(t, map[string]string{"before the headers": "500 after 0s, last", "in the middle of the answer": broken}, func(t *testing.T, want string) {
		r := newRig(t, "", echo)
		r.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
			switch {
			case req.URL.Path != "/panic":
			case want == broken:
				w = panicky{ResponseWriter: w}
			default:
				req.Body = panicky{Closer: req.Body}
			}
			r.proxy.ServeHTTP(w, req)
		})
		got := r.do("POST", "/panic", "x")
		got.expect(t, want)
		equal(t, "it says so", strings.Contains(got.body, `"code":"internal"`), want != broken)
		holds(t, !strings.Contains(got.body, "boom"), "the body is %s", got.body)
		r.completed().expect(t, "error", "internal: panic: boom")
		line := r.log.one(t, "panic in a request: this is a bug, please report it")
		line.expect(t, "request_id", got.header.Get(requestIDHeader))
		holds(t, strings.Contains(fmt.Sprint(line["stack"]), "proxy_test.go"), "the stack is %v", line["stack"])
		equal(t, "the body of the next answer", r.do("POST", "/", "x").body, "x")
		r.expectErrors(typeInternal)
	})
}

// TestRequestCompleted: one line per request with exactly these keys, in this order, and neither queries nor headers nor bodies in it.
func TestRequestCompleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Request-Id", "req_upstream")
			time.Sleep(1500 * time.Millisecond)
			http.NewResponseController(w).Flush()
			time.Sleep(time.Second)
			io.WriteString(w, "secret-answer")
		})
		got := r.do("POST", "/v1//messages%2F?key=secret-query", "secret-body", "Authorization", "Bearer secret-token")
		r.completed()
		text := r.log.buf.String()
		holds(t, !strings.Contains(text, "secret"), "the log has a secret in it:\n%s", text)
		want := `"level":"INFO","message":"request completed","request_id":"` + got.header.Get("X-Proxy-Request-Id") + `","method":"POST","path":"/v1//messages%2F","status":200,` +
			`"latency_ms":2500,"ttfb_ms":1500,"attempts":1,"bytes_in":11,"bytes_out":13,"upstream_request_id":"req_upstream","tailnet_node":"","tailnet_user":""}`
		_, line, _ := strings.Cut(text[strings.LastIndex(text, "{"):], ",")
		equal(t, "the line", line, want+"\n")
	})
}

// TestLongNames: what a client makes long is cut in its line.
func TestLongNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", never)
		long := strings.Repeat("X", 2*maxLogged)
		r.doFor(time.Second, long, "/"+long, "")
		r.completed().expect(t, "method", shorten(long), "path", shorten("/"+long))
	})
}

// TestLogWaitsForIdentity: the log line comes with the caller's name when tailscaled says it; the answer does not wait.
func TestLogWaitsForIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tn, _ := followed(t, running, func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(time.Second)
			io.WriteString(w, whoisAlice)
		})
		r := newRig(t, "", echo)
		r.proxy.tailnet = tn // as without -local
		for i, wait := range []time.Duration{time.Second, 0} {
			r.post().expect(t, "200 after 0s")
			synctest.Wait()
			early := len(r.log.lines(t, "request completed"))
			time.Sleep(wait)
			synctest.Wait()
			lines := r.log.lines(t, "request completed")
			holds(t, wait == 0 || early == i, "%d lines at once", early)
			equal(t, "lines in the end", len(lines), i+1)
			lines[i].expect(t, "tailnet_node", alice.node, "tailnet_user", alice.user)
		}
	})
}

// roundTripper answers without a network.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestTailnetDecides: before the first connection 503, after a loss requests are still served, and strangers get
// 403 if callers must be known.
func TestTailnetDecides(t *testing.T) {
	up, down := connectedState, lacks(tailnetNotRunning, "x")
	type row struct {
		states   []*tailnetState
		required bool
		whois    int    // tailscaled's status
		want     string // the answer's status, and its Retry-After
	}
	inBubbles(t, map[string]row{
		"nothing seen":                       {want: "503 2"},
		"not connected yet":                  {states: []*tailnetState{down}, want: "503 2"},
		"connected":                          {states: []*tailnetState{up}, want: "200 "},
		"lost":                               {states: []*tailnetState{up, down}, want: "200 "},
		"connected, stranger":                {states: []*tailnetState{up}, required: true, whois: 404, want: "403 "},
		"connected, tailscaled does not say": {states: []*tailnetState{up}, required: true, whois: 500, want: "503 1"},
		"not connected yet, stranger":        {states: []*tailnetState{down}, required: true, want: "503 2"},
	}, func(t *testing.T, row row) {
		r := newRig(t, "", echo)
		tn, _ := newTestTailnet()
		tn.client.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: row.whois, Body: http.NoBody}, nil
		})
		for _, state := range row.states {
			tn.publish(state)
		}
		r.proxy.tailnet = tn
		r.proxy.cfg.requireTailnet = row.required
		got := r.post()
		equal(t, "the answer", fmt.Sprint(got.status, " ", got.header.Get("Retry-After")), row.want)
		r.expectErrors()
	})
}
