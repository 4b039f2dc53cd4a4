package e2e

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestColdStart shows that 300 requests at once, to a proxy that has no connection
// upstream yet, open as many as they need, and not one each.
func TestColdStart(t *testing.T) {
	t.Parallel()
	s := proxytest.NewScene(t)
	up := s.StartAPI(fakeanthropic.HTTP2, fakeanthropic.Slow(100*time.Millisecond, answerOK), "")
	var answers []<-chan proxytest.Answer
	for range 300 {
		answers = append(answers, s.InBackground(strings.NewReader(proxytest.Message)))
	}
	for _, a := range answers {
		s.Passed(<-a, 200, "ok", 1)
	}
	if n := up.Opened(); n > 4 {
		t.Errorf("%d connections were opened, want 4 at most", n)
	}
}

// TestDepartures shows that clients which start requests and leave, again and again,
// cost others nothing: not their streams, nor a connection each.
func TestDepartures(t *testing.T) {
	t.Parallel()
	const streams, leavers, departures = 20, 30, 20
	finish := make(chan struct{})
	s := proxytest.NewScene(t)
	up := s.API(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if body, _ := io.ReadAll(r.Body); string(body) == "stream" {
			io.WriteString(w, "begun, ")
			fakeanthropic.Flush(w)
			<-finish
			io.WriteString(w, "whole")
			return
		}
		<-r.Context().Done()
	}))
	s.Proxy = proxytest.Local(t, up.URL, "", up.Env()...) // whose log may have any number of the departures
	var answers []<-chan proxytest.Answer
	for range streams {
		answers = append(answers, s.InBackground(strings.NewReader("stream")))
	}
	s.AtWork(streams)
	var wg sync.WaitGroup
	for range leavers {
		wg.Go(func() {
			for range departures {
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
				if a, err := s.Try(s.Request("POST", "/v1/messages", strings.NewReader(proxytest.Message)).WithContext(ctx)); err == nil {
					t.Errorf("a request that nobody answers got %d", a.StatusCode)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	close(finish)
	for _, a := range answers {
		s.Passed(<-a, 200, "begun, whole", 1)
	}
	if n := up.Opened(); n > 2+leavers*departures/100 {
		t.Errorf("%d connections were opened for %d departures", n, leavers*departures)
	}
}

// TestUnreadUploads shows that uploads which the upstream does not read, and which
// fill the window of their connection, hold up nobody else's.
func TestUnreadUploads(t *testing.T) {
	t.Parallel()
	const unread, size = 6, 2 << 20
	begun, read := make(chan struct{}, unread), make(chan struct{})
	var first sync.Once
	s := proxytest.NewScene(t)
	s.StartAPI(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Unread") != "" {
			begun <- struct{}{}
			<-read
		}
		answerOK(w, r)
	}), "")
	defer first.Do(func() { close(read) }) // also of a test that fails
	upload := func(headers ...string) <-chan proxytest.Answer {
		return s.InBackground(bytes.NewReader(make([]byte, size)), headers...)
	}
	var answers []<-chan proxytest.Answer
	for range unread {
		answers = append(answers, upload("X-Unread", "1"))
	}
	for range unread { // the proxy has all of a body before it begins to send it
		<-begun
	}
	time.Sleep(1200 * time.Millisecond) // a connection on which a body stands still for a second takes no more
	start := time.Now()
	s.Passed(<-upload(), 200, "ok", 1)
	t.Logf("another upload was answered after %v", time.Since(start))
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("another upload took %v", took)
	}
	first.Do(func() { close(read) })
	for _, a := range answers {
		s.Passed(<-a, 200, "ok", 1)
	}
}
