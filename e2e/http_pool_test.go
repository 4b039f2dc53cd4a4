package e2e

import (
	"context"
	"io"
	"net/http"
	"sync"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// TestColdStart shows that 300 requests at once, to a proxy that has no connection
// upstream yet, open as many as they need, and not one each.
func TestColdStart(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Slow(100*time.Millisecond, answerOK))
	p := proxyTo(t, up, "")
	var answers []<-chan result
	for range 300 {
		answers = append(answers, inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", zeros(100))))
	}
	for _, a := range answers {
		if r := <-a; r.err != nil || r.StatusCode != http.StatusOK {
			t.Fatalf("a request failed: %+v", r)
		}
	}
	if n := up.Connections(); n > 4 {
		t.Errorf("%d connections were opened, want 4 at most", n)
	}
}

// TestDepartures shows that clients which start requests and leave, again and again,
// cost others nothing: not their streams, nor a connection each.
func TestDepartures(t *testing.T) {
	t.Parallel()
	const streams, leavers, departures = 20, 30, 20
	finish := make(chan struct{})
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stream" {
			io.WriteString(w, "begun, ")
			fakeanthropic.Flush(w)
			<-finish
			io.WriteString(w, "whole")
			return
		}
		<-r.Context().Done()
	}))
	p := proxyTo(t, up, "")
	var answers []<-chan result
	for range streams {
		answers = append(answers, inBackground(t, newRequest(t, "GET", p.URL()+"/stream", nil)))
	}
	waitMetric(t, p, streams, "proxy_requests_in_flight")
	var wg sync.WaitGroup
	for range leavers {
		wg.Go(func() {
			for range departures {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				if a, err := do(client(t), newRequest(t, "POST", p.URL()+"/v1/messages", zeros(100)).WithContext(ctx)); err == nil {
					t.Errorf("a request that nobody answers got %d", a.StatusCode)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	close(finish)
	for _, a := range answers {
		if r := <-a; r.err != nil || r.body != "begun, whole" {
			t.Errorf("a stream of somebody else: %+v", r)
		}
	}
	if n := up.Connections(); n > 2+leavers*departures/100 {
		t.Errorf("%d connections were opened for %d departures", n, leavers*departures)
	}
}

// TestUnreadUploads shows that uploads which the upstream does not read, and which
// fill the window of their connection, hold up nobody else's.
func TestUnreadUploads(t *testing.T) {
	t.Parallel()
	const unread, size = 6, 2 << 20
	begun, read := make(chan struct{}, unread), make(chan struct{})
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/unread" {
			begun <- struct{}{}
			<-read
		}
		io.Copy(io.Discard, r.Body)
	}))
	p := proxyTo(t, up, "")
	var answers []<-chan result
	for range unread {
		answers = append(answers, inBackground(t, newRequest(t, "POST", p.URL()+"/unread", zeros(size))))
	}
	for range unread { // the proxy has all of a body before it begins to send it
		<-begun
	}
	time.Sleep(1200 * time.Millisecond) // a connection on which a body stands still for a second takes no more
	start := time.Now()
	a := roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", zeros(size)))
	if a.StatusCode != http.StatusOK || time.Since(start) > 10*time.Second {
		t.Errorf("another upload: %d after %v", a.StatusCode, time.Since(start))
	}
	t.Logf("another upload was answered after %v", time.Since(start))
	close(read)
	for _, a := range answers {
		if r := <-a; r.err != nil || r.StatusCode != http.StatusOK {
			t.Errorf("an upload that was read in the end: %+v", r)
		}
	}
}
