package e2e

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestStatusesPass shows that the upstream's statuses are its own affair: they
// reach the client as they are, are not retried and not counted as errors.
func TestStatusesPass(t *testing.T) {
	t.Parallel()
	statuses := []int{200, 201, 202, 301, 302, 307, 400, 401, 403, 404, 408, 409, 413, 422, 429, 499, 500, 502, 503, 504, 529, 599}
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Location", "/elsewhere")
			status, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
			w.WriteHeader(status)
			io.WriteString(w, "status "+r.URL.Path)
		}))
		p := proxyTo(t, up, "")
		c := client(t)
		for _, status := range statuses {
			path := "/" + strconv.Itoa(status)
			a := roundTrip(t, c, newRequest(t, "POST", p.URL()+path, strings.NewReader(messageBody)))
			if a.StatusCode != status || a.body != "status "+path || a.Header.Get("Location") != "/elsewhere" {
				t.Errorf("answer %d %q location %q, want %d", a.StatusCode, a.body, a.Header.Get("Location"), status)
			}
			if !requestID.MatchString(a.Header.Get("X-Proxy-Request-Id")) {
				t.Errorf("%d: x-proxy-request-id %q", status, a.Header.Get("X-Proxy-Request-Id"))
			}
			checkMetric(t, p, 1, "proxy_requests_total", "status", strconv.Itoa(status), "method", "POST")
		}
		if n := len(up.Requests()); n != len(statuses) {
			t.Errorf("the upstream got %d requests, want %d", n, len(statuses))
		}
		completed(t, p, len(statuses))
		checkMetric(t, p, 0, "proxy_upstream_errors_total")
	})
}

// TestAPIErrorsPass shows the same for the API's real errors.
func TestAPIErrorsPass(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		status     int
		kind       string
		retryAfter string
	}{
		{status: 400, kind: "invalid_request_error"},
		{status: 401, kind: "authentication_error"},
		{status: 429, kind: "rate_limit_error", retryAfter: "17"},
		{status: 529, kind: "overloaded_error", retryAfter: "3"},
	} {
		t.Run(tt.kind, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Fail(tt.status))
			p := proxyTo(t, up, "")
			a := post(t, p, messageBody)
			if a.StatusCode != tt.status || !strings.Contains(a.body, `"type":"`+tt.kind+`"`) {
				t.Errorf("answer %d %s", a.StatusCode, a.body)
			}
			if got := a.Header.Get("Retry-After"); got != tt.retryAfter {
				t.Errorf("retry-after %q, want %q", got, tt.retryAfter)
			}
			id := a.Header.Get("Request-Id")
			if !strings.HasPrefix(id, "req_fake_") || !strings.Contains(a.body, id) || a.Header.Get("Anthropic-Ratelimit-Requests-Limit") == "" {
				t.Errorf("headers %v with body %s are not the upstream's", a.Header, a.body)
			}
		})
	}
}

// TestGzipUntouched shows that compressed bodies pass as they are, whether or not
// the client asked for them.
func TestGzipUntouched(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.Gzip(fakeanthropic.API{}))
		p := proxyTo(t, up, "")
		for _, headers := range [][]string{nil, {"Accept-Encoding", "gzip"}, {"Accept-Encoding", "br;q=1.0, gzip;q=0.8"}} {
			a := post(t, p, messageBody, headers...)
			if a.Header.Get("Content-Encoding") != "gzip" || !bytes.HasPrefix([]byte(a.body), []byte{0x1f, 0x8b}) {
				t.Fatalf("%v: headers %v, body %.20q: not gzip", headers, a.Header, a.body)
			}
			z, err := gzip.NewReader(strings.NewReader(a.body))
			if err != nil {
				t.Fatal(err)
			}
			plain, err := io.ReadAll(z)
			if err != nil || !strings.Contains(string(plain), "end_turn") {
				t.Errorf("%v: unpacked to %q, %v", headers, plain, err)
			}
			reqs := up.Requests()
			want := ""
			if headers != nil {
				want = headers[1]
			}
			if got := reqs[len(reqs)-1].Header.Get("Accept-Encoding"); got != want {
				t.Errorf("the upstream got accept-encoding %q, want %q", got, want)
			}
		}
	})
}

// TestHTTP10Client shows that an HTTP/1.0 client gets answers that end with the
// connection, also streams, and without chunks.
func TestHTTP10Client(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "")
	for _, body := range []string{messageBody, streamBody} {
		c := dial(t, p)
		c.send(t, "POST /v1/messages HTTP/1.0", "Authorization: Bearer x", "Content-Length: "+strconv.Itoa(len(body)), "", body)
		all, err := io.ReadAll(c.r)
		if err != nil {
			t.Fatalf("the answer does not end with the connection: %v", err)
		}
		head, rest, _ := strings.Cut(string(all), "\r\n\r\n")
		if !strings.HasPrefix(head, "HTTP/1.0 200") && !strings.HasPrefix(head, "HTTP/1.1 200") {
			t.Errorf("answer %q", head)
		}
		if strings.Contains(strings.ToLower(head), "transfer-encoding") {
			t.Errorf("an HTTP/1.0 client got chunks: %q", head)
		}
		if !strings.HasPrefix(rest, "{") && !strings.HasSuffix(rest, "message_stop\"}\n\n") {
			t.Errorf("body %q is not whole", rest)
		}
	}
}

func TestHead(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "12345")
		}))
		p := proxyTo(t, up, "")
		c := dial(t, p)
		for range 2 { // the second one shows that nothing is left of the first
			c.send(t, "HEAD /v1/models HTTP/1.1", "Host: proxy", "", "")
			if a := c.answer(t, "HEAD"); a.StatusCode != 200 || a.Header.Get("Content-Length") != "12345" {
				t.Errorf("answer %d %v, want 200 with the upstream's content-length", a.StatusCode, a.Header)
			}
		}
	})
}

func TestBodilessStatuses(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Etag", `"x"`)
			status, _ := strconv.Atoi(r.URL.Path[1:])
			w.WriteHeader(status)
		}))
		p := proxyTo(t, up, "")
		c := dial(t, p)
		for _, status := range []int{204, 304, 204} {
			c.send(t, "GET /"+strconv.Itoa(status)+" HTTP/1.1", "Host: proxy", "", "")
			a := c.answer(t, "GET")
			if a.StatusCode != status || a.body != "" || a.Header.Get("Etag") != `"x"` {
				t.Errorf("answer %d %q %v, want %d", a.StatusCode, a.body, a.Header, status)
			}
			for _, name := range []string{"Content-Length", "Transfer-Encoding", "Content-Type"} {
				if v, ok := a.Header[name]; ok {
					t.Errorf("%d: %s %q invented", status, name, v)
				}
			}
		}
	})
}

// TestTrailers shows that an answer's trailers are forwarded, announced or not,
// and that a request's are dropped.
func TestTrailers(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Trailer", "X-Announced")
			io.WriteString(w, "ok")
			fakeanthropic.Flush(w)
			w.Header().Set("X-Announced", "yes")
			w.Header().Set(http.TrailerPrefix+"X-Unannounced", "too")
		}))
		p := proxyTo(t, up, "")
		a := exchange(t, p, "POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "Trailer: X-Sum", "TE: trailers", "",
			"2\r\nhi\r\n0\r\nX-Sum: 42\r\n\r\n")
		if a.StatusCode != 200 || a.body != "ok" {
			t.Errorf("answer %d %q", a.StatusCode, a.body)
		}
		if got := a.Trailer.Get("X-Announced"); got != "yes" {
			t.Errorf("announced trailer %q, want yes (trailers: %v)", got, a.Trailer)
		}
		if got := a.Trailer.Get("X-Unannounced"); got != "too" {
			t.Errorf("unannounced trailer %q, want too (trailers: %v)", got, a.Trailer)
		}
		proxytest.Eventually(t, "the handler's end", func() bool { return !only(t, up).Ended.IsZero() })
		if r := only(t, up); len(r.Trailer) > 0 || r.Header.Get("X-Sum") != "" || string(r.Body) != "hi" {
			t.Errorf("the upstream got trailers %v, headers %v, body %q", r.Trailer, r.Header, r.Body)
		}
	})
}

// TestStreamsAtOnce shows that headers and every event pass when they come, not
// when there is more.
func TestStreamsAtOnce(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		next := make(chan string)
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/event-stream")
			fakeanthropic.Flush(w)
			for piece := range next {
				io.WriteString(w, piece)
				fakeanthropic.Flush(w)
			}
		}))
		p := proxyTo(t, up, "")
		resp, err := client(t).Do(newRequest(t, "GET", p.URL()+"/stream", nil)) // returns with the headers alone
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var delays []time.Duration
		for _, piece := range []string{"a", "event: ping\n", "data: {}\n\n", "x"} {
			start := time.Now()
			next <- piece
			got := make([]byte, len(piece))
			if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != piece {
				t.Fatalf("got %q, %v; want %q", got, err, piece)
			}
			delays = append(delays, time.Since(start).Round(10*time.Microsecond))
		}
		close(next)
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			t.Errorf("at the end came %q, %v", rest, err)
		}
		// A piece that is held back until there is more never arrives at all.
		t.Logf("from the upstream's write to the client's read: %v", delays)
	})
}
