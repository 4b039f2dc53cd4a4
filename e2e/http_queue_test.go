package e2e

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// gate is an upstream that holds every request until it is let through.
type gate chan struct{}

func (g gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	select {
	case <-g:
		io.WriteString(w, "ok")
	case <-r.Context().Done():
	}
}

// let lets one request through.
func (g gate) let(t *testing.T) {
	t.Helper()
	select {
	case g <- struct{}{}:
	case <-time.After(proxytest.Timeout):
		t.Fatal("no request is held at the upstream")
	}
}

// TestQueue sends ten requests through two places: all succeed, never more than
// two at a time, in order of arrival, and the gauges tell what happens.
func TestQueue(t *testing.T) {
	t.Parallel()
	const requests, places = 10, 2
	hold := make(gate)
	up := upstream(t, fakeanthropic.HTTP2, hold)
	p := proxyTo(t, up, fmt.Sprintf("proxy.max_connections = %d", places))

	var results []<-chan result
	for i := range requests {
		req := newRequest(t, "POST", fmt.Sprintf("%s/%d", p.URL(), i), strings.NewReader(messageBody))
		results = append(results, inBackground(t, req))
		// The next one must not overtake this one on its way in.
		proxytest.Eventually(t, fmt.Sprintf("%d requests in the proxy", i+1), func() bool {
			m := proxytest.Scrape(t, p)
			inFlight, queued := m.Value("proxy_requests_in_flight"), m.Value("proxy_requests_queued")
			return inFlight == float64(min(i+1, places)) && queued == float64(max(0, i+1-places))
		})
	}
	if status, body, err := p.Health(); err != nil || status != 200 {
		t.Errorf("/health while the queue is full: %d %s %v", status, body, err)
	}

	for done := 1; done <= requests; done++ {
		proxytest.Eventually(t, "every place taken at the upstream", func() bool {
			return len(up.Requests()) == min(requests, done-1+places)
		})
		hold.let(t)
		waitMetric(t, p, float64(done), "proxy_requests_total", "status", "200")
		left := requests - done
		waitMetric(t, p, float64(min(left, places)), "proxy_requests_in_flight")
		waitMetric(t, p, float64(max(0, left-places)), "proxy_requests_queued")
	}
	for i, result := range results {
		if res := <-result; res.err != nil || res.StatusCode != 200 {
			t.Errorf("request %d: %v, %v", i, res.Response, res.err)
		}
	}
	checkArrivals(t, up.Requests(), places)
}

// checkArrivals checks that requests named /0, /1, ... arrived in that order,
// give or take those that were let in together, and never more than places at a
// time.
func checkArrivals(t *testing.T, all []fakeanthropic.Request, places int) {
	t.Helper()
	for i, r := range all {
		// The first ones enter at once and may race to the upstream.
		if want := fmt.Sprintf("/%d", i); r.RequestURI != want && i >= places {
			t.Errorf("arrival %d is %s, want %s", i, r.RequestURI, want)
		}
		atOnce := 0
		for _, other := range all {
			if !other.Started.After(r.Started) && other.Ended.After(r.Started) {
				atOnce++
			}
		}
		if atOnce > places {
			t.Errorf("%d requests at the upstream when %s arrived, want at most %d", atOnce, r.RequestURI, places)
		}
	}
}

// TestBodyMemory shows that bodies wait for memory in order of arrival, and that
// memory is free as soon as the headers of an answer are there, not only when a
// long stream ends.
func TestBodyMemory(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 2")
	first := visit(t, newRequest(t, "POST", p.URL()+"/0", bytes.NewReader(pattern(mib))))
	second := visit(t, newRequest(t, "POST", p.URL()+"/1", bytes.NewReader(pattern(mib))))
	proxytest.Eventually(t, "both at the upstream", func() bool {
		reqs := up.Requests()
		return len(reqs) == 2 && reqs[0].BodyLen == mib && reqs[1].BodyLen == mib
	})
	checkMetric(t, p, 2*mib, "proxy_buffered_body_bytes")

	up.Handle(fakeanthropic.API{StallAt: 1}) // answers, and then goes on for ever
	stream := strings.Replace(streamBody, `"hi"`, `"`+strings.Repeat("x", mib/2)+`"`, 1)
	third := visit(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(stream)))
	proxytest.Eventually(t, "three requests in the proxy", func() bool {
		m := proxytest.Scrape(t, p)
		return m.Value("proxy_requests_in_flight")+m.Value("proxy_requests_queued") == 3
	})
	if n := len(up.Requests()); n != 2 {
		t.Fatalf("%d requests at the upstream while the memory is taken, want 2", n)
	}
	first.leave()
	<-third.answered
	waitMetric(t, p, mib, "proxy_buffered_body_bytes") // the second one's
	second.leave()
	waitMetric(t, p, 0, "proxy_buffered_body_bytes")
	third.leave()
}

// TestQueueTimeCountsInDuration shows that waiting shows up as latency, which is
// how the runbook tells operators to find a full limiter.
func TestQueueTimeCountsInDuration(t *testing.T) {
	t.Parallel()
	hold := make(gate)
	up := upstream(t, fakeanthropic.HTTP2, hold)
	p := proxyTo(t, up, "proxy.max_connections = 1")
	first := inBackground(t, newRequest(t, "GET", p.URL()+"/0", nil))
	waitMetric(t, p, 1, "proxy_requests_in_flight")
	second := inBackground(t, newRequest(t, "GET", p.URL()+"/1", nil))
	waitMetric(t, p, 1, "proxy_requests_queued")
	queued := time.Now()
	time.Sleep(300 * time.Millisecond) // the time that must show
	hold.let(t)
	waited := time.Since(queued)
	hold.let(t)
	for _, done := range []<-chan result{first, second} {
		if res := <-done; res.err != nil || res.StatusCode != 200 {
			t.Errorf("answer %v, %v", res.Response, res.err)
		}
	}
	for _, line := range completed(t, p, 2) {
		if ms := line.Number("latency_ms"); ms < float64(waited.Milliseconds())-5 {
			t.Errorf("log line %s: latency %v ms, want the %v of waiting in it", line.Raw, ms, waited)
		}
	}
}
