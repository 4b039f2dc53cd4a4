package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// TestNothingInvented shows that the upstream gets the client's headers and the
// beta, and nothing that an HTTP library likes to add.
func TestNothingInvented(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		lines []string
		want  []string // names of headers, besides anthropic-beta
	}{
		{name: "GET", lines: []string{"GET / HTTP/1.1", "Host: proxy", "", ""}},
		{name: "HTTP/1.0", lines: []string{"GET / HTTP/1.0", "", ""}},
		{name: "POST", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 2", "", "hi"}, want: []string{"Content-Length"}},
		{name: "empty POST", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 0", "", ""}, want: []string{"Content-Length"}},
		{
			name: "what the client sends", want: []string{"Accept", "Accept-Encoding", "Authorization", "Content-Type", "User-Agent", "X-Api-Key"},
			lines: []string{
				"GET / HTTP/1.1", "Host: proxy", "User-Agent: curl/8", "Accept: */*", "Accept-Encoding: zstd",
				"Content-Type: x/y", "Authorization: Bearer abc", "X-Api-Key: key", "", "",
			},
		},
	}
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, answerOK)
		p := proxyTo(t, up, "")
		for i, tt := range tests {
			exchange(t, p, tt.lines...)
			h := up.Requests()[i].Header
			want := slices.Sorted(slices.Values(append(tt.want, "Anthropic-Beta")))
			if got := slices.Sorted(maps.Keys(h)); !slices.Equal(got, want) {
				t.Errorf("%s: the upstream got headers %v, want %v", tt.name, got, want)
			}
			if got := h["Anthropic-Beta"]; !slices.Equal(got, []string{fakeanthropic.OAuthBeta}) {
				t.Errorf("%s: the upstream got anthropic-beta %q", tt.name, got)
			}
			for _, line := range tt.lines[1:] {
				name, value, _ := strings.Cut(line, ": ")
				if name != "Host" && value != "" && h.Get(name) != value {
					t.Errorf("%s: %s arrived as %q, want %q", tt.name, name, h.Get(name), value)
				}
			}
		}
	})
}

func TestManyHeaderLines(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		var values []string
		for i := range 100 {
			values = append(values, fmt.Sprintf("value %d", i))
		}
		echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header()["X-Dup"] = values
		})
		up := upstream(t, protocol, echo)
		p := proxyTo(t, up, "")
		lines := append([]string{"GET / HTTP/1.1", "Host: proxy"}, headerLines(100, 200)...)
		for _, value := range values {
			lines = append(lines, "X-Dup: "+value)
		}
		a := exchange(t, p, append(lines, "", "")...)
		h := only(t, up).Header
		if got := h.Values("X-Dup"); !slices.Equal(got, values) {
			t.Errorf("duplicates arrived as %q", got)
		}
		for i := range 100 {
			if got := h.Get(fmt.Sprintf("X-Line-%d", i)); len(got) != 200 {
				t.Errorf("X-Line-%d arrived as %q", i, got)
			}
		}
		if got := a.Header.Values("X-Dup"); !slices.Equal(got, values) {
			t.Errorf("the answer's duplicates came back as %q", got)
		}
	})
}

// TestResponseHeaders shows what is dropped of an answer's headers, and that
// nothing else is touched or added.
func TestResponseHeaders(t *testing.T) {
	t.Parallel()
	p1 := map[string]string{ // what HTTP/2 does not allow in the first place
		"Connection": "X-Named", "X-Named": "1", "Keep-Alive": "timeout=5", "Proxy-Connection": "keep-alive",
	}
	kept := map[string]string{
		"Retry-After": "17", "Request-Id": "req_upstream", "Anthropic-Ratelimit-Requests-Remaining": "0", "X-Odd": "ä,b",
		"Server": "fake", "Set-Cookie": "a=b; Path=/", "Cf-Ray": "abc", "Date": "Mon, 01 Jan 2001 00:00:00 GMT", "Content-Length": "2",
	}
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			for name, value := range kept {
				h.Set(name, value)
			}
			if protocol == fakeanthropic.HTTP1 {
				for name, value := range p1 {
					h.Set(name, value)
				}
			}
			h.Set("Alt-Svc", `h3=":443"`)
			h.Set("X-Proxy-Request-Id", "req_forged")
			h["Content-Type"] = nil // sends none
			fmt.Fprint(w, "ok")
		}))
		p := proxyTo(t, up, "")
		a := exchange(t, p, "GET / HTTP/1.1", "Host: proxy", "", "")
		if got := a.Header.Values("X-Proxy-Request-Id"); len(got) != 1 || !requestID.MatchString(got[0]) {
			t.Errorf("x-proxy-request-id %q, want the proxy's own", got)
		}
		a.Header.Del("X-Proxy-Request-Id")
		for name, value := range kept {
			if got := a.Header.Values(name); !slices.Equal(got, []string{value}) {
				t.Errorf("%s came back as %q, want %q", name, got, value)
			}
			a.Header.Del(name)
		}
		if len(a.Header) > 0 {
			t.Errorf("headers that should not be there: %v", a.Header)
		}
		line := completed(t, p, 1)[0]
		if line.Text("upstream_request_id") != "req_upstream" {
			t.Errorf("log line %s: want upstream_request_id req_upstream", line.Raw)
		}
	})
}
