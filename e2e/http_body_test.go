package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

const tenMiB = 10 << 20

// TestLargestBody sends the largest body allowed there and back, bit for bit.
func TestLargestBody(t *testing.T) {
	t.Parallel()
	body := pattern(tenMiB)
	sum := sha256.Sum256(body)
	want := hex.EncodeToString(sum[:])
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			all, err := io.ReadAll(r.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			w.Write(all)
		})
		up := upstream(t, protocol, echo)
		p := proxyTo(t, up, "")
		for name, reader := range map[string]io.Reader{
			"declared": bytes.NewReader(body),
			"chunked":  io.MultiReader(bytes.NewReader(body)), // hides the length
		} {
			a := roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", reader))
			if a.StatusCode != 200 {
				t.Fatalf("%s: status %d: %.200s", name, a.StatusCode, a.body)
			}
			reqs := up.Requests()
			got := reqs[len(reqs)-1]
			if got.BodyLen != tenMiB || got.BodySHA256 != want {
				t.Errorf("%s: the upstream got %d bytes with hash %s, want %d with %s", name, got.BodyLen, got.BodySHA256, tenMiB, want)
			}
			if back := sha256.Sum256([]byte(a.body)); back != sum {
				t.Errorf("%s: %d bytes came back, not those that were sent", name, len(a.body))
			}
		}
		for _, line := range completed(t, p, 2) {
			if line.Number("bytes_in") != tenMiB || line.Number("bytes_out") != tenMiB {
				t.Errorf("log line %s: want bytes_in and bytes_out %d", line.Raw, tenMiB)
			}
		}
	})
}

// TestDeclaredTooLarge shows that a body that declares itself too large is refused
// before a byte of it is asked for.
func TestDeclaredTooLarge(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "")
	c := dial(t, p)
	c.send(t, "POST /v1/messages HTTP/1.1", "Host: proxy", "Expect: 100-continue",
		fmt.Sprintf("Content-Length: %d", tenMiB+1), "", "")
	a := c.answer(t, "POST") // a 100 would be this one
	e := checkProxyError(t, a, http.StatusBadRequest, "invalid_request")
	if !strings.Contains(e.Error.Message, "10") {
		t.Errorf("message %q does not name the limit", e.Error.Message)
	}
	checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "invalid_request")
	checkMetric(t, p, 1, "proxy_requests_total", "status", "400", "method", "POST")
	if n := len(up.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}
}

// TestExpectContinue shows that a client that asks first is told to go on, by the
// proxy itself.
func TestExpectContinue(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP1, answerOK)
	p := proxyTo(t, up, "")
	c := dial(t, p)
	c.send(t, "POST /v1/messages HTTP/1.1", "Host: proxy", "Expect: 100-continue", "Content-Length: 5", "", "")
	if a := c.answer(t, "POST"); a.StatusCode != http.StatusContinue {
		t.Fatalf("first answer %d, want 100", a.StatusCode)
	}
	c.send(t, "hello")
	if a := c.answer(t, "POST"); a.StatusCode != 200 || a.body != "ok" {
		t.Errorf("answer %d %q, want the upstream's", a.StatusCode, a.body)
	}
	if r := only(t, up); r.Header.Get("Expect") != "" || string(r.Body) != "hello" {
		t.Errorf("the upstream got headers %v and body %q", r.Header, r.Body)
	}
}

func TestCountedTooLarge(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "")
	a := roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", zeros(tenMiB+1)))
	checkProxyError(t, a, http.StatusBadRequest, "invalid_request")
	completed(t, p, 1)
	checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "invalid_request")
	checkMetric(t, p, 0, "proxy_buffered_body_bytes")
	if n := len(up.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}
}

// TestRefusedWhileSending shows that a client that has more to send, and waits
// with it, is told at once that its request is refused.
func TestRefusedWhileSending(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, answerOK)
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	tooMuch := strings.Repeat("x", 1<<20+1)
	tests := []struct {
		name   string
		lines  []string
		status int
	}{
		{name: "counted", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "", "200000\r\n" + tooMuch}, status: 400},
		{name: "declared", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 2097152", "", "x"}, status: 400},
		{name: "malformed", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "", "zz\r\n"}, status: 400},
		{name: "CONNECT", lines: []string{"CONNECT x:443 HTTP/1.1", "Host: x", "Content-Length: 10", "", "x"}, status: 405},
		{name: "our own path", lines: []string{"POST /health HTTP/1.1", "Host: proxy", "Content-Length: 10", "", "x"}, status: 405},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, p)
			c.SetDeadline(time.Now().Add(10 * time.Second)) // nothing else ends a wait for what never comes
			c.send(t, tt.lines...)
			if a := c.answer(t, "POST"); a.StatusCode != tt.status {
				t.Errorf("status %d, want %d", a.StatusCode, tt.status)
			}
			c.checkClosed(t)
		})
	}
}

func TestBodyLimitConfigured(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, answerOK)
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 2\nbody_memory_mb = 2")
	for _, tt := range []struct {
		size   int
		status int
	}{{size: 2 << 20, status: 200}, {size: 2<<20 + 1, status: 400}} {
		req := newRequest(t, "POST", p.URL()+"/v1/messages", bytes.NewReader(pattern(tt.size)))
		if a := roundTrip(t, client(t), req); a.StatusCode != tt.status {
			t.Errorf("%d bytes: status %d, want %d", tt.size, a.StatusCode, tt.status)
		}
	}
}

func TestMalformedChunks(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, body string }{
		{name: "no length", body: "zz\r\nhello\r\n0\r\n\r\n"},
		{name: "length too large", body: "ffffffffffffffffff\r\nhello\r\n0\r\n\r\n"},
		{name: "no end of chunk", body: "5\r\nhelloXX0\r\n\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, nil)
			p := proxyTo(t, up, "")
			a := exchange(t, p, "POST /v1/messages HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "", tt.body)
			checkProxyError(t, a, http.StatusBadRequest, "invalid_request")
			checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "invalid_request")
			if n := len(up.Requests()); n != 0 {
				t.Errorf("the upstream got %d requests, want none", n)
			}
		})
	}
}

// TestEarlyAnswer shows that an upstream that answers before it has read the
// request is heard.
func TestEarlyAnswer(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		refuse := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Request-Id", "req_early")
			http.Error(w, "too much", http.StatusRequestEntityTooLarge)
		})
		up := upstream(t, protocol, refuse)
		p := proxyTo(t, up, "")
		body := pattern(tenMiB)
		for range 20 { // it is a race in every HTTP client
			a := roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", bytes.NewReader(body)))
			if a.StatusCode != http.StatusRequestEntityTooLarge || a.body != "too much\n" || a.Header.Get("Request-Id") != "req_early" {
				t.Fatalf("answer %d %.200q, want the upstream's 413", a.StatusCode, a.body)
			}
		}
		completed(t, p, 20)
		checkMetric(t, p, 0, "proxy_upstream_errors_total")
	})
}

// TestChunkedRequestCloses shows that nothing can be smuggled behind a chunked
// request, whatever else it says about its length.
func TestChunkedRequestCloses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		headers []string
	}{
		{name: "chunked", headers: []string{"Transfer-Encoding: chunked"}},
		{name: "chunked and a length", headers: []string{"Content-Length: 4", "Transfer-Encoding: chunked"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP1, answerOK)
			p := proxyTo(t, up, "")
			c := dial(t, p)
			lines := append([]string{"POST /first HTTP/1.1", "Host: proxy"}, tt.headers...)
			c.send(t, append(lines, "", "5\r\nhello\r\n0\r\n\r\nGET /smuggled HTTP/1.1", "Host: proxy", "", "")...)
			a := c.answer(t, "POST")
			if a.StatusCode != 200 || !a.Close {
				t.Errorf("answer %d, close %v; want 200 and connection: close", a.StatusCode, a.Close)
			}
			c.checkClosed(t)
			if r := only(t, up); string(r.Body) != "hello" || r.RequestURI != "/first" {
				t.Errorf("the upstream got %s with %q", r.RequestURI, r.Body)
			}
		})
	}
}
