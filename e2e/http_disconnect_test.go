package e2e

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// visitor is a client that can leave at any time.
type visitor struct {
	answered chan struct{} // closed when the answer's first byte has arrived
	cancel   context.CancelFunc
	done     chan struct{} // closed at the end
	err      error         // then: nil if the answer was complete
}

// visit starts a request. Its answer is thrown away.
func visit(t testing.TB, req *http.Request) *visitor {
	t.Helper()
	ctx, cancel := context.WithCancel(req.Context())
	v := &visitor{answered: make(chan struct{}), cancel: cancel, done: make(chan struct{})}
	c := client(t)
	go func() {
		defer close(v.done)
		var resp *http.Response
		if resp, v.err = c.Do(req.WithContext(ctx)); v.err != nil {
			return
		}
		defer resp.Body.Close()
		if _, v.err = io.ReadFull(resp.Body, make([]byte, 1)); v.err != nil {
			return
		}
		close(v.answered)
		_, v.err = io.Copy(io.Discard, resp.Body)
	}()
	return v
}

// leave returns when the connection is closed.
func (v *visitor) leave() {
	v.cancel()
	<-v.done
}

// TestClientLeaves shows that the upstream's request ends with the client's, that
// its place is free at once, and that it counts as 499 and as no error.
func TestClientLeaves(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name     string
		handler  http.Handler
		protocol fakeanthropic.Protocol
		streams  bool
	}{
		{name: "while waiting, HTTP/1.1", handler: fakeanthropic.Silent(), protocol: fakeanthropic.HTTP1},
		{name: "while waiting, HTTP/2", handler: fakeanthropic.Silent(), protocol: fakeanthropic.HTTP2},
		{name: "while streaming, HTTP/1.1", handler: fakeanthropic.API{Deltas: 1e6, Interval: 10 * time.Millisecond}, protocol: fakeanthropic.HTTP1, streams: true},
		{name: "while streaming, HTTP/2", handler: fakeanthropic.API{Deltas: 1e6, Interval: 10 * time.Millisecond}, protocol: fakeanthropic.HTTP2, streams: true},
		{name: "in a silent stream", handler: fakeanthropic.API{StallAt: 2}, protocol: fakeanthropic.HTTP2, streams: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, tt.protocol, tt.handler)
			p := proxyTo(t, up, "proxy.max_connections = 1")
			// The machine is noisy: the best of some tries shows what the proxy does.
			const promised = 100 * time.Millisecond
			best, tries := time.Hour, 0
			for ; tries < 5 || best > promised && tries < 40; tries++ {
				i := tries
				v := visit(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody)))
				proxytest.Eventually(t, "the request at the upstream", func() bool {
					reqs := up.Requests()
					return len(reqs) == i+1 && reqs[i].BodyLen == int64(len(streamBody))
				})
				if tt.streams {
					<-v.answered
				}
				leftAt := time.Now()
				v.leave()
				proxytest.Eventually(t, "upstream request cancelled", func() bool { return !up.Requests()[i].Cancelled.IsZero() })
				best = min(best, up.Requests()[i].Cancelled.Sub(leftAt))
			}
			t.Logf("the upstream request was cancelled after %v (best of %d)", best, tries)
			if best > promised {
				t.Errorf("the upstream request was cancelled only after %v", best)
			}

			for _, line := range completed(t, p, tries) {
				if line.Number("status") != 499 {
					t.Errorf("log line %s: want status 499", line.Raw)
				}
			}
			checkMetric(t, p, float64(tries), "proxy_requests_total", "status", "499", "method", "POST")
			checkMetric(t, p, 0, "proxy_upstream_errors_total")
			checkMetric(t, p, 0, "proxy_requests_in_flight")
			up.Handle(nil)
			if a := post(t, p, messageBody); a.StatusCode != 200 {
				t.Errorf("the next request: status %d, want 200: the place is not free", a.StatusCode)
			}
		})
	}
}

// claudeCode is the size of Claude Code's requests. While a request waits, its
// body is in the sockets' buffers, with the news of the client's departure behind
// it: a body too large for them would keep the news from arriving.
const claudeCode = 49 << 10

// TestClientLeavesQueue shows that a client that leaves the queue for a place is
// gone from it, and that the upstream never hears of its request.
func TestClientLeavesQueue(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"GET", "POST"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
			p := proxyTo(t, up, "proxy.max_connections = 1")
			first := visit(t, newRequest(t, "POST", p.URL()+"/first", strings.NewReader(messageBody)))
			waitMetric(t, p, 1, "proxy_requests_in_flight")

			var body io.Reader
			if method == "POST" {
				body = bytes.NewReader(pattern(claudeCode))
			}
			queued := visit(t, newRequest(t, method, p.URL()+"/queued", body))
			waitMetric(t, p, 1, "proxy_requests_queued")
			start := time.Now()
			queued.leave()
			waitMetric(t, p, 0, "proxy_requests_queued")
			t.Logf("the queue was empty after %v", time.Since(start).Round(time.Millisecond))
			waitMetric(t, p, 1, "proxy_requests_total", "status", "499", "method", method)
			checkMetric(t, p, 1, "proxy_requests_in_flight")

			first.leave()
			up.Handle(nil)
			if a := post(t, p, messageBody); a.StatusCode != 200 {
				t.Errorf("the next request: status %d, want 200", a.StatusCode)
			}
			for _, r := range up.Requests() {
				if r.RequestURI == "/queued" {
					t.Error("the request of a client that had left reached the upstream")
				}
			}
			checkMetric(t, p, 0, "proxy_upstream_errors_total")
		})
	}
}

// TestClientLeavesBodyQueue is the same for the queue for buffer memory.
func TestClientLeavesBodyQueue(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	first := visit(t, newRequest(t, "POST", p.URL()+"/first", bytes.NewReader(pattern(mib))))
	proxytest.Eventually(t, "the first request at the upstream", func() bool {
		reqs := up.Requests()
		return len(reqs) == 1 && reqs[0].BodyLen == mib
	})
	checkMetric(t, p, mib, "proxy_buffered_body_bytes")

	queued := visit(t, newRequest(t, "POST", p.URL()+"/queued", bytes.NewReader(pattern(claudeCode))))
	proxytest.Eventually(t, "two requests in the proxy", func() bool {
		m := proxytest.Scrape(t, p)
		return m.Value("proxy_requests_in_flight")+m.Value("proxy_requests_queued") == 2
	})
	queued.leave()
	proxytest.Eventually(t, "one request in the proxy", func() bool {
		m := proxytest.Scrape(t, p)
		return m.Value("proxy_requests_in_flight") == 1 && m.Value("proxy_requests_queued") == 0
	})
	waitMetric(t, p, 1, "proxy_requests_total", "status", "499", "method", "POST")
	first.leave()
	waitMetric(t, p, 0, "proxy_buffered_body_bytes")

	up.Handle(nil)
	if a := post(t, p, messageBody); a.StatusCode != 200 {
		t.Errorf("the next request: status %d, want 200", a.StatusCode)
	}
	if n := len(up.Requests()); n != 2 {
		t.Errorf("the upstream got %d requests, want the first and the last", n)
	}
	checkMetric(t, p, 0, "proxy_upstream_errors_total")
}

// TestClientDiesUploading covers clients that are gone before all of their body
// was.
func TestClientDiesUploading(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		header string
		body   string
	}{
		{name: "declared length", header: "Content-Length: 1000", body: "only this"},
		{name: "chunked", header: "Transfer-Encoding: chunked", body: "9\r\nonly this\r\n"},
		{name: "within a chunk", header: "Transfer-Encoding: chunked", body: "FF\r\nonly this"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, nil)
			p := proxyTo(t, up, "proxy.max_connections = 1")
			c := dial(t, p)
			c.send(t, "POST /v1/messages HTTP/1.1", "Host: proxy", tt.header, "", tt.body)
			waitMetric(t, p, 1, "proxy_requests_in_flight")
			c.Close()
			if line := completed(t, p, 1)[0]; line.Number("status") != 499 {
				t.Errorf("log line %s: want status 499", line.Raw)
			}
			checkMetric(t, p, 0, "proxy_upstream_errors_total")
			checkMetric(t, p, 0, "proxy_requests_in_flight")
			checkMetric(t, p, 0, "proxy_buffered_body_bytes")
			if n := len(up.Requests()); n != 0 {
				t.Errorf("the upstream got %d requests, want none", n)
			}
		})
	}
}
