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

// TestSlowSender shows that an upload may take as long as it likes, but not fall
// silent for longer than timeout_secs.
func TestSlowSender(t *testing.T) {
	t.Parallel()
	t.Run("steady", func(t *testing.T) {
		t.Parallel()
		up := upstream(t, fakeanthropic.HTTP2, answerOK)
		p := proxyTo(t, up, "proxy.timeout_secs = 2")
		c := dial(t, p)
		c.send(t, "POST / HTTP/1.1", "Host: proxy", "Content-Length: 8", "", "")
		for range 8 {
			time.Sleep(600 * time.Millisecond) // the pace, not a wait for anything
			c.send(t, "x")
		}
		if a := c.answer(t, "POST"); a.StatusCode != 200 {
			t.Errorf("status %d, want 200", a.StatusCode)
		}
		if r := only(t, up); string(r.Body) != "xxxxxxxx" {
			t.Errorf("the upstream got %q", r.Body)
		}
	})
	for name, lines := range map[string][]string{
		"silent":          {"Content-Length: 8", "", "x"},
		"silent, chunked": {"Transfer-Encoding: chunked", "", "8\r\nx"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, answerOK)
			p := proxyTo(t, up, "proxy.timeout_secs = 1")
			c := dial(t, p)
			start := time.Now()
			c.send(t, append([]string{"POST / HTTP/1.1", "Host: proxy"}, lines...)...)
			checkProxyError(t, c.answer(t, "POST"), http.StatusRequestTimeout, "")
			checkDuration(t, "the silence", time.Since(start), time.Second)
			c.checkClosed(t)
			completed(t, p, 1)
			checkMetric(t, p, 0, "proxy_buffered_body_bytes")
			if n := len(up.Requests()); n != 0 {
				t.Errorf("the upstream got %d requests, want none", n)
			}
		})
	}
}

// TestSlowUploadYields shows that a trickling upload gives its memory back when
// others wait for it, after the 10 s that it is given.
func TestSlowUploadYields(t *testing.T) {
	t.Parallel()
	const mib = 1 << 20
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	slow := dial(t, p)
	slow.send(t, "POST /slow HTTP/1.1", "Host: proxy", fmt.Sprintf("Content-Length: %d", mib), "", "")
	waitMetric(t, p, 1, "proxy_requests_in_flight")
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop) })
	go func() { // 1 KiB/s, in small pieces
		for tick := time.Tick(250 * time.Millisecond); ; {
			select {
			case <-tick:
				if _, err := slow.Write(make([]byte, 256)); err != nil {
					return
				}
			case <-stop:
				return
			}
		}
	}()
	start := time.Now()
	waiting := inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", bytes.NewReader(pattern(mib))))
	a := slow.answer(t, "POST")
	t.Logf("the slow upload was answered %d after %v", a.StatusCode, time.Since(start).Round(time.Millisecond))
	checkProxyError(t, a, http.StatusRequestTimeout, "")
	if took := time.Since(start); took < 9*time.Second || took > 25*time.Second {
		t.Errorf("the slow upload was given %v, want about 10s", took)
	}
	if res := <-waiting; res.err != nil {
		t.Errorf("the waiting request got no answer: %v", res.err)
	}
	if n := len(up.Requests()); n != 1 {
		t.Errorf("the upstream got %d requests, want the waiting one only", n)
	}
}

// TestSlowReader shows the same of clients that read slowly, or not at all: then
// the upstream is rid of them.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	const piece, pieces = 1 << 20, 64 // more than sockets buffer
	flood := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(piece*pieces))
		for range pieces {
			if _, err := w.Write(make([]byte, piece)); err != nil {
				return
			}
		}
	})
	t.Run("steady", func(t *testing.T) {
		t.Parallel()
		up := upstream(t, fakeanthropic.HTTP2, flood)
		p := proxyTo(t, up, "proxy.timeout_secs = 2")
		resp, err := client(t).Do(newRequest(t, "GET", p.URL()+"/", nil))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		for range 8 {
			time.Sleep(600 * time.Millisecond) // the pace, not a wait for anything
			if _, err := io.CopyN(io.Discard, resp.Body, piece*pieces/8); err != nil {
				t.Fatal(err)
			}
		}
		if n, err := io.Copy(io.Discard, resp.Body); n != 0 || err != nil {
			t.Errorf("at the end: %d bytes, %v", n, err)
		}
	})
	t.Run("silent", func(t *testing.T) {
		t.Parallel()
		up := upstream(t, fakeanthropic.HTTP2, flood)
		p := proxyTo(t, up, "[proxy]\ntimeout_secs = 1\nmax_connections = 1")
		c := dial(t, p)
		start := time.Now()
		c.send(t, "GET / HTTP/1.1", "Host: proxy", "", "")
		line := completed(t, p, 1)[0]
		t.Logf("given up after %v", time.Since(start).Round(time.Millisecond))
		if took := time.Since(start); took < time.Second {
			t.Errorf("given up after %v, want at least 1s", took)
		}
		if line.Text("error") == "" || line.Number("status") != 499 {
			t.Errorf("log line %s: want status 499 and an error", line.Raw)
		}
		proxytest.Eventually(t, "the upstream's end", func() bool { return !only(t, up).Ended.IsZero() })
		checkMetric(t, p, 0, "proxy_requests_in_flight")
	})
}

// TestSlowHeaders shows that half a request does not hold a place.
func TestSlowHeaders(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, answerOK)
	p := proxyTo(t, up, "proxy.max_connections = 1")
	for range 10 {
		dial(t, p).send(t, "POST /v1/messages HTTP/1.1", "Host: pro")
	}
	if a := post(t, p, messageBody); a.StatusCode != 200 {
		t.Errorf("status %d, want 200", a.StatusCode)
	}
}

// TestPipelining shows that requests sent ahead are answered in order.
func TestPipelining(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.URL.Path)
	}))
	p := proxyTo(t, up, "")
	c := dial(t, p)
	var all strings.Builder
	for i := range 5 {
		fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: proxy\r\nContent-Length: 2\r\n\r\nhi", i)
	}
	c.send(t, all.String())
	for i := range 5 {
		if a := c.answer(t, "POST"); a.StatusCode != 200 || a.body != fmt.Sprintf("/%d", i) {
			t.Errorf("answer %d: %d %q", i, a.StatusCode, a.body)
		}
	}
}
