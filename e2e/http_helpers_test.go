package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// upstream starts a fake API for a test; a nil handler answers as the real API.
func upstream(t testing.TB, protocol fakeanthropic.Protocol, handler http.Handler) *fakeanthropic.Server {
	t.Helper()
	s, err := fakeanthropic.Start(protocol, handler)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// proxyTo starts a proxy in front of the fake API. config may be empty.
func proxyTo(t testing.TB, up *fakeanthropic.Server, config string) *proxytest.Proxy {
	t.Helper()
	return proxytest.Local(t, up.URL, config, up.Env()...)
}

// eachProtocol runs a test with an upstream of HTTP/1.1 and one of HTTP/2.
func eachProtocol(t *testing.T, test func(*testing.T, fakeanthropic.Protocol)) {
	for _, protocol := range []fakeanthropic.Protocol{fakeanthropic.HTTP1, fakeanthropic.HTTP2} {
		t.Run(protocol.String(), func(t *testing.T) {
			t.Parallel()
			test(t, protocol)
		})
	}
}

// answerOK reads the request and answers 200 with "ok".
var answerOK = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	io.WriteString(w, "ok")
})

// messageBody is a small Messages request.
const messageBody = `{"model":"claude-fake-1","max_tokens":16,"messages":[{"role":"user","content":"hi"}]}`

// streamBody asks for the same as an event stream.
const streamBody = `{"model":"claude-fake-1","max_tokens":16,"stream":true,"messages":[{"role":"user","content":"hi"}]}`

// client is an HTTP client that adds and decodes nothing, with connections of
// its own.
func client(t testing.TB) *http.Client {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{
		Transport:     transport,
		Timeout:       40 * time.Second, // only to keep a failing test from hanging
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// newRequest makes a request to the proxy with a bearer token. headers are
// name, value, name, value, ...
func newRequest(t testing.TB, method, url string, body io.Reader, headers ...string) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer test-token")
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	return req
}

// answer is a whole response.
type answer struct {
	*http.Response
	body string
}

// do sends a request and reads the answer to its end.
func do(c *http.Client, req *http.Request) (answer, error) {
	resp, err := c.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, fmt.Errorf("reading the answer: %w", err)
	}
	return answer{resp, string(body)}, nil
}

// roundTrip is do for the test's own goroutine.
func roundTrip(t testing.TB, c *http.Client, req *http.Request) answer {
	t.Helper()
	a, err := do(c, req)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// result is what became of a request in the background.
type result struct {
	answer
	err error
}

// inBackground sends a request with a client of its own.
func inBackground(t testing.TB, req *http.Request) <-chan result {
	c, done := client(t), make(chan result, 1)
	go func() {
		a, err := do(c, req)
		done <- result{a, err}
	}()
	return done
}

// post sends a Messages request and reads the answer to its end.
func post(t testing.TB, p *proxytest.Proxy, body string, headers ...string) answer {
	t.Helper()
	return roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(body), headers...))
}

// proxyError is the body of the proxy's own answers.
type proxyError struct {
	Type  string `json:"type"`
	Error struct {
		Type      string `json:"type"`
		Code      string `json:"code"`
		Message   string `json:"message"`
		RequestID string `json:"request_id"`
	} `json:"error"`
	RequestID string `json:"request_id"`
}

var requestID = regexp.MustCompile(`^req_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// checkProxyError checks that the answer is the proxy's own, complete and
// consistent, with this status and code ("" is any), and returns its body.
func checkProxyError(t testing.TB, a answer, status int, code string) proxyError {
	t.Helper()
	if a.StatusCode != status {
		t.Errorf("status %d, want %d", a.StatusCode, status)
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("content-type %q, want application/json", ct)
	}
	var e proxyError
	if err := json.Unmarshal([]byte(a.body), &e); err != nil {
		t.Fatalf("the error body is no JSON: %v: %q", err, a.body)
	}
	if e.Type != "error" || e.Error.Type != "proxy_error" || e.Error.Message == "" ||
		e.Error.Code == "" || (code != "" && e.Error.Code != code) {
		t.Errorf("error body %s, want type error, proxy_error, code %q and a message", a.body, code)
	}
	id := a.Header.Get("X-Proxy-Request-Id")
	if !requestID.MatchString(id) {
		t.Errorf("x-proxy-request-id %q, want req_<uuid>", id)
	}
	if got := a.Header.Get("Request-Id"); got != id || e.RequestID != id || e.Error.RequestID != id {
		t.Errorf("request-id %q and body %s, want %q everywhere", got, a.body, id)
	}
	return e
}

// completed waits for n "request completed" lines and returns them.
func completed(t testing.TB, p *proxytest.Proxy, n int) []proxytest.Line {
	t.Helper()
	var lines []proxytest.Line
	proxytest.Eventually(t, fmt.Sprintf("%d lines %q", n, proxytest.MsgRequestCompleted), func() bool {
		lines = nil
		for _, line := range p.Logs() {
			if line.Message() == proxytest.MsgRequestCompleted {
				lines = append(lines, line)
			}
		}
		return len(lines) >= n
	})
	if len(lines) > n {
		t.Fatalf("%d lines %q, want %d", len(lines), proxytest.MsgRequestCompleted, n)
	}
	return lines
}

// waitMetric waits until a metric has a value.
func waitMetric(t testing.TB, p *proxytest.Proxy, want float64, name string, labels ...string) {
	t.Helper()
	proxytest.Eventually(t, fmt.Sprintf("%s%v = %v", name, labels, want), func() bool {
		return proxytest.Scrape(t, p).Value(name, labels...) == want
	})
}

// checkMetric checks the value of a metric once all requests so far are counted.
// A request is counted after its answer is sent, and leaves its log line after
// that: wait for the line where the value must not grow any more.
func checkMetric(t testing.TB, p *proxytest.Proxy, want float64, name string, labels ...string) {
	t.Helper()
	var got float64
	proxytest.Eventually(t, fmt.Sprintf("%s%v at least %v", name, labels, want), func() bool {
		got = proxytest.Scrape(t, p).Value(name, labels...)
		return got >= want
	})
	if got != want {
		t.Errorf("%s%v = %v, want %v", name, labels, got, want)
	}
}

// only returns the single request that the upstream got.
func only(t testing.TB, up *fakeanthropic.Server) fakeanthropic.Request {
	t.Helper()
	all := up.Requests()
	if len(all) != 1 {
		t.Fatalf("the upstream got %d requests, want 1", len(all))
	}
	return all[0]
}

// zeros is a body of n zero bytes that needs no memory.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// pattern is a body of n bytes in which no stretch repeats soon.
func pattern(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		fmt.Fprintf(&b, "%d,", i)
	}
	return b.Bytes()[:n]
}
