package e2e

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestTargets shows that request targets arrive as they came, byte for byte.
func TestTargets(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		target string
		want   string // "" means as it came
	}{
		{name: "root", target: "/"},
		{name: "messages", target: "/v1/messages?beta=true"},
		{name: "double slash inside", target: "/v1//messages"},
		{name: "double slash first", target: "//v1/messages"},
		{name: "many slashes", target: "////"},
		{name: "dots", target: "/a/../b/./c/.."},
		{name: "escaped slash", target: "/a%2Fb"},
		{name: "escaped lower case", target: "/a%2fb"},
		{name: "needlessly escaped", target: "/%41%7e"},
		{name: "escaped dots", target: "/%2e%2e/x"},
		{name: "semicolon and bad escape in the query", target: "/?a;b=%zz"},
		{name: "semicolon in the path", target: "/a;b=c/d"},
		{name: "empty query", target: "/v1/messages?"},
		{name: "two question marks", target: "/v1?a=b?c=d"},
		{name: "query order and repetition", target: "/v1?z=1&a=2&z=3&&"},
		{name: "plus and escaped space", target: "/v1?a=b+c%20d"},
		{name: "characters that are usually escaped", target: `/a|b"[]\`},
		{name: "the same in the query", target: `/v1?a|b"[]\=^{}<>` + "`"},
		{name: "braces and angle brackets", target: "/{a}<b>^`"},
		{name: "raw UTF-8", target: "/größe/日本?q=ü"},
		{name: "escaped UTF-8", target: "/gr%C3%B6%C3%9Fe"},
		{name: "bytes that are no UTF-8", target: "/\xff\xfe?\x80"},
		{name: "colon in the first segment", target: "/a:b"},
		{name: "something like a URL", target: "/http://example.com/"},
		{name: "nearly ours", target: "/health/"},
		{name: "nearly ours, doubled", target: "//health"},
		{name: "nearly ours, escaped", target: "/%68ealth"},
		{name: "nearly ours, longer", target: "/metrics/x"},
		{name: "absolute form", target: "http://elsewhere.example/v1/models?x=1", want: "/v1/models?x=1"},
		{name: "absolute form with escapes", target: "http://elsewhere.example//a%2Fb?;", want: "//a%2Fb?;"},
	}
	for _, protocol := range []fakeanthropic.Protocol{fakeanthropic.HTTP1, fakeanthropic.HTTP2} {
		up := upstream(t, protocol, answerOK)
		p := proxyTo(t, up, "")
		for i, tt := range tests {
			t.Run(fmt.Sprintf("%v/%s", protocol, tt.name), func(t *testing.T) {
				a := exchange(t, p, "GET "+tt.target+" HTTP/1.1", "Host: proxy", "", "")
				if a.StatusCode != 200 || a.body != "ok" {
					t.Fatalf("answer %d %q", a.StatusCode, a.body)
				}
				want := tt.want
				if want == "" {
					want = tt.target
				}
				reqs := up.Requests()
				if len(reqs) != i+1 {
					t.Fatalf("the upstream got %d requests, want %d", len(reqs), i+1)
				}
				if got := reqs[i].RequestURI; got != want {
					t.Errorf("the upstream got %q, want %q", got, want)
				}
				if host := strings.TrimPrefix(up.URL, "https://"); reqs[i].Host != host {
					t.Errorf("the upstream got host %q, want its own, %q", reqs[i].Host, host)
				}
			})
		}
	}
}

// TestUpstreamBasePath shows that a path of the upstream's URL comes before the
// request's.
func TestUpstreamBasePath(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, answerOK)
		p := proxytest.Local(t, up.URL+"/gateway/anthropic%2Fv2", "", up.Env()...)
		for i, target := range []string{"/v1/messages?beta=true", "//v1/a%2Fb", "/"} {
			exchange(t, p, "GET "+target+" HTTP/1.1", "Host: proxy", "", "")
			reqs := up.Requests()
			if len(reqs) != i+1 {
				t.Fatalf("the upstream got %d requests, want %d", len(reqs), i+1)
			}
			if got, want := reqs[i].RequestURI, "/gateway/anthropic%2Fv2"+target; got != want {
				t.Errorf("the upstream got %q, want %q", got, want)
			}
		}
	})
}

// TestMethods shows that every method but CONNECT is forwarded, and which ones
// have a name in the metrics.
func TestMethods(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, answerOK)
		p := proxyTo(t, up, "")
		for i, tt := range []struct{ method, label string }{
			{"GET", "GET"}, {"HEAD", "HEAD"}, {"POST", "POST"}, {"PUT", "PUT"}, {"PATCH", "PATCH"},
			{"DELETE", "DELETE"}, {"OPTIONS", "OPTIONS"}, {"TRACE", "TRACE"}, {"FROBNICATE", "other"}, {"get", "other"},
		} {
			a := exchange(t, p, tt.method+" /v1/models HTTP/1.1", "Host: proxy", "", "")
			reqs := up.Requests()
			if a.StatusCode != 200 || len(reqs) != i+1 || reqs[i].Method != tt.method {
				t.Errorf("%s: status %d, %d requests at the upstream", tt.method, a.StatusCode, len(reqs))
			}
			completed(t, p, i+1)
			if !proxytest.Scrape(t, p).Has("proxy_requests_total", "status", "200", "method", tt.label) {
				t.Errorf("%s: not counted as method %q", tt.method, tt.label)
			}
		}
	})
}

func TestOptionsAsterisk(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, answerOK)
		p := proxyTo(t, up, "")
		if a := exchange(t, p, "OPTIONS * HTTP/1.1", "Host: proxy", "", ""); a.StatusCode != 200 {
			t.Errorf("status %d", a.StatusCode)
		}
		if r := only(t, up); r.Method != "OPTIONS" || r.RequestURI != "*" {
			t.Errorf("the upstream got %s %s, want OPTIONS *", r.Method, r.RequestURI)
		}
	})
}

func TestConnectRefused(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP1, answerOK)
	p := proxyTo(t, up, "")
	for _, target := range []string{"api.example.com:443", "/v1/messages"} {
		a := exchange(t, p, "CONNECT "+target+" HTTP/1.1", "Host: api.example.com:443", "", "")
		if a.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("CONNECT %s: status %d, want 405", target, a.StatusCode)
		}
	}
	if n := len(up.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}
}

// TestRefusedByServer covers what net/http answers by itself: these requests have
// no method or path to count them under.
func TestRefusedByServer(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP1, answerOK)
	p := proxyTo(t, up, "")
	tests := []struct {
		name   string
		lines  []string
		status int
	}{
		{name: "unparsable path", lines: []string{"GET /%zz HTTP/1.1", "Host: proxy"}, status: 400},
		{name: "no host", lines: []string{"GET / HTTP/1.1"}, status: 400},
		{name: "two hosts", lines: []string{"GET / HTTP/1.1", "Host: a", "Host: b"}, status: 400},
		{name: "space in the target", lines: []string{"GET /a b HTTP/1.1", "Host: proxy"}, status: 400},
		{name: "no HTTP", lines: []string{"hello"}, status: 400},
		{name: "HTTP/3", lines: []string{"GET / HTTP/3.0", "Host: proxy"}, status: 505},
		{name: "space before the colon", lines: []string{"GET / HTTP/1.1", "Host: proxy", "X-A : b"}, status: 400},
		{name: "folded header", lines: []string{"GET / HTTP/1.1", "Host: proxy", " folded: yes"}, status: 400},
		{name: "two lengths", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 3", "Content-Length: 4"}, status: 400},
		{name: "negative length", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: -3"}, status: 400},
		{name: "unknown transfer coding", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: gzip, chunked"}, status: 501},
		{name: "header over 64 KiB", lines: []string{"GET / HTTP/1.1", "Host: proxy", "X-Big: " + strings.Repeat("x", 72<<10)}, status: 431},
		{name: "headers over 64 KiB", lines: append([]string{"GET / HTTP/1.1", "Host: proxy"}, headerLines(2000, 40)...), status: 431},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := dial(t, p)
			// The proxy may answer and close before all of a long one is written.
			fmt.Fprint(c, strings.Join(append(tt.lines, "", ""), "\r\n"))
			if a := c.answer(t, "GET"); a.StatusCode != tt.status {
				t.Errorf("status %d, want %d", a.StatusCode, tt.status)
			}
		})
	}
	if n := len(up.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}
	checkMetric(t, p, 0, "proxy_requests_total")
	checkMetric(t, p, 0, "proxy_upstream_errors_total")
}

// headerLines makes n header lines with values of the given length.
func headerLines(n, length int) []string {
	lines := make([]string, n)
	for i := range lines {
		lines[i] = fmt.Sprintf("X-Line-%d: %s", i, strings.Repeat("v", length))
	}
	return lines
}

// TestOwnPaths covers /health, /livez and /metrics with methods and queries.
func TestOwnPaths(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP1, answerOK)
	p := proxyTo(t, up, "")
	types := map[string]string{
		"/health":  "application/json",
		"/livez":   "application/json",
		"/metrics": "text/plain; version=0.0.4; charset=utf-8",
	}
	for path, contentType := range types {
		for _, target := range []string{path, path + "?x=y"} {
			get := exchange(t, p, "GET "+target+" HTTP/1.1", "Host: proxy", "", "")
			if get.StatusCode != 200 || get.body == "" || get.Header.Get("Content-Type") != contentType {
				t.Errorf("GET %s: %d, %v, %q", target, get.StatusCode, get.Header, get.body)
			}
			head := exchange(t, p, "HEAD "+target+" HTTP/1.1", "Host: proxy", "", "")
			if head.StatusCode != 200 || head.body != "" || head.Header.Get("Content-Type") != contentType {
				t.Errorf("HEAD %s: %d, %v, %q", target, head.StatusCode, head.Header, head.body)
			}
		}
		for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "FROB"} {
			a := exchange(t, p, method+" "+path+" HTTP/1.1", "Host: proxy", "Content-Length: 0", "", "")
			if a.StatusCode != 405 || a.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s %s: %d, allow %q; want 405 and GET, HEAD", method, path, a.StatusCode, a.Header.Get("Allow"))
			}
		}
	}
	if a := exchange(t, p, "GET /livez HTTP/1.1", "Host: proxy", "", ""); strings.TrimSpace(a.body) != `{"status":"alive"}` {
		t.Errorf("/livez: %q", a.body)
	}
	if n := len(up.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}
	checkMetric(t, p, 0, "proxy_requests_total")
}
