package main

import (
	"bufio"
	"bytes"
	"maps"
	"net/http"
	"net/textproto"
	"net/url"
	"reflect"
	"strings"
	"testing"
)

// oauthBeta is what is injected by default.
var oauthBeta = []header{{name: betaHeader, values: []string{"oauth-2025-04-20"}}}

func TestRequestHeader(t *testing.T) {
	type headers = map[string][]string
	beta := headers{"Anthropic-Beta": {"oauth-2025-04-20"}, "User-Agent": nil}
	with := func(h, more headers) headers {
		h = maps.Clone(h)
		maps.Copy(h, more)
		return h
	}
	for _, row := range []struct {
		name     string
		in       string // the lines of a request's header
		injected []header
		want     headers
	}{
		{name: "nothing is invented", in: "", want: beta},
		{name: "what passes", in: "Authorization: Bearer x\nX-Api-Key: k\nUser-Agent: claude-cli\nAccept-Encoding: gzip, br\nCookie: a=b\nX-Stainless-Timeout: 600\n",
			want: with(beta, headers{"Authorization": {"Bearer x"}, "X-Api-Key": {"k"}, "User-Agent": {"claude-cli"},
				"Accept-Encoding": {"gzip, br"}, "Cookie": {"a=b"}, "X-Stainless-Timeout": {"600"}})},
		{name: "several lines of one name stay several", in: "X-A: 1\nX-A: 2\nX-A:\n", want: with(beta, headers{"X-A": {"1", "2", ""}})},
		{name: "an empty User-Agent stays empty", in: "User-Agent:\n", want: with(beta, headers{"User-Agent": {""}})},
		{name: "hop by hop", in: "Connection: keep-alive\nKeep-Alive: timeout=5\nProxy-Authenticate: x\nProxy-Authorization: x\nProxy-Connection: x\n" +
			"TE: trailers\nTrailer: X-T\nTransfer-Encoding: chunked\nUpgrade: websocket\nHTTP2-Settings: x\n", want: beta},
		{name: "named by Connection", in: "Connection: X-A, x-b\nConnection:close,, x-c ,\nX-A: 1\nX-B: 1\nX-C: 1\nX-D: 1\nClose: 1\n",
			want: with(beta, headers{"X-D": {"1"}})},
		{name: "named by Connection: the betas", in: "Connection: anthropic-beta\nAnthropic-Beta: a\n", want: beta},
		{name: "named by Connection: no User-Agent is invented", in: "Connection: user-agent\nUser-Agent: x\n", want: beta},
		{name: "named by Connection: an idempotency key", in: "Connection: idempotency-key\nIdempotency-Key: x\n", want: beta},
		{name: "forgeable", in: "Forwarded: for=1\nX-Forwarded-For: 1\nX-Forwarded-Proto: x\nX-Forwarded-Anything: x\nX-Real-IP: 1\n" +
			"Tailscale-User-Login: root\nTailscale-Anything: x\nX-Forward: ok\nX-Real-Ips: ok\nTailscale: ok\n",
			want: with(beta, headers{"X-Forward": {"ok"}, "X-Real-Ips": {"ok"}, "Tailscale": {"ok"}})},
		{name: "answered here, or net/http's to send", in: "Expect: 100-continue\nContent-Length: 3\nContent-Type: x\n",
			want: with(beta, headers{"Content-Type": {"x"}})},

		{name: "betas: merged in order", in: "Anthropic-Beta: b,a\n", want: with(beta, headers{"Anthropic-Beta": {"b,a,oauth-2025-04-20"}})},
		{name: "betas: several lines become one", in: "Anthropic-Beta: b, a\nanthropic-beta: c\n", want: with(beta, headers{"Anthropic-Beta": {"b, a,c,oauth-2025-04-20"}})},
		{name: "betas: present already", in: "Anthropic-Beta: a, oauth-2025-04-20 ,b\n", want: with(beta, headers{"Anthropic-Beta": {"a, oauth-2025-04-20 ,b"}})},
		{name: "betas: present in the second line", in: "Anthropic-Beta: a\nAnthropic-Beta: oauth-2025-04-20\n", want: with(beta, headers{"Anthropic-Beta": {"a,oauth-2025-04-20"}})},
		{name: "betas: duplicates are the client's affair", in: "Anthropic-Beta: a,a\n", want: with(beta, headers{"Anthropic-Beta": {"a,a,oauth-2025-04-20"}})},
		{name: "betas: whole tokens are compared", in: "Anthropic-Beta: oauth-2025-04-20x,xoauth-2025-04-20\n",
			want: with(beta, headers{"Anthropic-Beta": {"oauth-2025-04-20x,xoauth-2025-04-20,oauth-2025-04-20"}})},
		{name: "betas: case counts", in: "Anthropic-Beta: OAuth-2025-04-20\n", want: with(beta, headers{"Anthropic-Beta": {"OAuth-2025-04-20,oauth-2025-04-20"}})},
		{name: "betas: empty", in: "Anthropic-Beta:\n", want: beta},
		{name: "betas: two injected, one present", in: "Anthropic-Beta: b\n", injected: []header{{betaHeader, []string{"a", "b"}}},
			want: with(beta, headers{"Anthropic-Beta": {"b,a"}})},
		{name: "betas: none injected", in: "Anthropic-Beta: b\n", injected: []header{{"X-A", []string{"1"}}},
			want: headers{"Anthropic-Beta": {"b"}, "X-A": {"1"}, "User-Agent": nil}},
		{name: "betas: a beta given twice is added once", in: "", injected: []header{{betaHeader, []string{"a", "a"}}},
			want: headers{"Anthropic-Beta": {"a"}, "User-Agent": nil}},

		{name: "others replace", in: "X-A: 1\nX-A: 2\nUser-Agent: x\n", injected: []header{{"X-A", []string{"ours"}}, {"User-Agent", []string{"ours"}}},
			want: headers{"X-A": {"ours"}, "User-Agent": {"ours"}}},
		{name: "others replace: what Connection names, too", in: "Connection: x-a\nX-A: 1\n", injected: []header{{"X-A", []string{"ours"}}},
			want: headers{"X-A": {"ours"}, "User-Agent": nil}},
		{name: "others replace: an idempotency key", in: "Idempotency-Key: 1\n", injected: []header{{"Idempotency-Key", []string{"ours"}}},
			want: headers{"Idempotency-Key": {"ours"}, "User-Agent": nil}},
	} {
		t.Run(row.name, func(t *testing.T) {
			in := parseHeader(t, row.in)
			before := in.Clone()
			injected := row.injected
			if injected == nil {
				injected = oauthBeta
			}
			got := requestHeader(in, injected)
			if !reflect.DeepEqual(headers(got), row.want) {
				t.Errorf("got  %q\nwant %q", got, row.want)
			}
			if !reflect.DeepEqual(in, before) {
				t.Errorf("the client's headers have become %q, they were %q", in, before)
			}
		})
	}
}

// parseHeader reads header lines.
func parseHeader(t testing.TB, lines string) http.Header {
	t.Helper()
	h, err := textproto.NewReader(bufio.NewReader(strings.NewReader(lines + "\n"))).ReadMIMEHeader()
	if err != nil {
		t.Fatal(err)
	}
	return http.Header(h)
}

// TestRequestHeaderShares: the header map is changed in place, but the injected values, which all requests
// share, are never written to.
func TestRequestHeaderShares(t *testing.T) {
	injected := []header{{betaHeader, []string{"b"}}, {"X-B", []string{"2"}}}
	for _, in := range []http.Header{{}, {"Anthropic-Beta": {"a"}}, {"Anthropic-Beta": {""}}} {
		rewriteRequestHeader(in, injected)
		rewriteRequestHeader(in, []header{{betaHeader, []string{"c"}}})
		if got := in.Get(betaHeader); !strings.HasSuffix(got, "b,c") {
			t.Errorf("the betas are %q", got)
		}
	}
	if injected[0].values[0] != "b" || injected[1].values[0] != "2" {
		t.Error("what is shared was written to")
	}
}

func TestCopyResponseHeader(t *testing.T) {
	for _, row := range []struct {
		name     string
		upstream http.Header
		want     http.Header
	}{
		{name: "a missing Content-Type stays missing", upstream: http.Header{}, want: http.Header{"Content-Type": nil}},
		{name: "what passes",
			upstream: http.Header{"Content-Type": {"text/event-stream"}, "Retry-After": {"7"}, "Request-Id": {"r"}, "Content-Encoding": {"br"}, "Content-Length": {"9"},
				"Anthropic-Ratelimit-Requests-Remaining": {"3"}, "Set-Cookie": {"a=1", "b=2"}, "Date": {"x"}, "Server": {"s"}, "X-Should-Retry": {"true"}},
			want: http.Header{"Content-Type": {"text/event-stream"}, "Retry-After": {"7"}, "Request-Id": {"r"}, "Content-Encoding": {"br"}, "Content-Length": {"9"},
				"Anthropic-Ratelimit-Requests-Remaining": {"3"}, "Set-Cookie": {"a=1", "b=2"}, "Date": {"x"}, "Server": {"s"}, "X-Should-Retry": {"true"}}},
		{name: "what ends here",
			upstream: http.Header{"Content-Type": {"x"}, "Connection": {"close, X-Hop"}, "X-Hop": {"1"}, "Keep-Alive": {"1"}, "Transfer-Encoding": {"chunked"},
				"Trailer": {"X-T"}, "Upgrade": {"h2c"}, "Proxy-Authenticate": {"x"}, "Te": {"x"}, "Alt-Svc": {`h3=":443"`}},
			want: http.Header{"Content-Type": {"x"}}},
		{name: "a Content-Type that ends here is not guessed again",
			upstream: http.Header{"Content-Type": {"x"}, "Connection": {"content-type"}}, want: http.Header{"Content-Type": nil}},
	} {
		t.Run(row.name, func(t *testing.T) {
			before := row.upstream.Clone()
			got := http.Header{}
			copyResponseHeader(got, row.upstream)
			if !reflect.DeepEqual(got, row.want) {
				t.Errorf("got  %q\nwant %q", got, row.want)
			}
			if !reflect.DeepEqual(row.upstream, before) {
				t.Errorf("the upstream's headers have become %q", row.upstream)
			}
		})
	}
}

// sentTarget lets net/http read a request with the given target, and returns the target that it
// then writes to an upstream; ok is false if it refuses to read it.
func sentTarget(t testing.TB, method, target, base string, absolute bool) (sent string, ok bool) {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(method + " " + target + " HTTP/1.1\r\nHost: proxy\r\n\r\n")))
	if err != nil || r.Method != method {
		return "", false
	}
	cfg := testConfig(t, "", overrides{upstream: base})
	url := upstreamURL(cfg.upstream, requestTarget(r), absolute)
	out := &http.Request{Method: method, URL: &url, Host: cfg.upstream.Host, Header: http.Header{}}
	var wire bytes.Buffer
	if absolute {
		err = out.WriteProxy(&wire)
	} else {
		err = out.Write(&wire)
	}
	if err != nil {
		t.Fatalf("net/http can't write %q: %v", target, err)
	}
	line, _, _ := strings.Cut(wire.String(), "\r\n")
	sent, isHTTP := strings.CutSuffix(strings.TrimPrefix(line, method+" "), " HTTP/1.1")
	if !isHTTP || !strings.HasPrefix(line, method+" ") {
		t.Fatalf("the request line is %q", line)
	}
	return sent, true
}

func TestTarget(t *testing.T) {
	for _, row := range []struct {
		name, method, target, base string
		absolute                   bool // through a forward proxy
		want                       string
	}{
		{name: "plain", target: "/v1/messages?beta=true", want: "/v1/messages?beta=true"},
		{name: "root", target: "/", want: "/"},
		{name: "empty query", target: "/x?", want: "/x?"},
		{name: "only an empty query", target: "/?", want: "/?"},
		{name: "two question marks", target: "/x??a?b", want: "/x??a?b"},
		{name: "query that can't be parsed", target: "/?a;b=%zz&%", want: "/?a;b=%zz&%"},
		{name: "query with odd characters", target: "/?a|b\"<>\\^`{}é[]", want: "/?a|b\"<>\\^`{}é[]"},
		{name: "encoded slash", target: "/a%2Fb%2fc", want: "/a%2Fb%2fc"},
		{name: "needless escapes", target: "/%41%7e", want: "/%41%7e"},
		{name: "double slashes inside", target: "/a//b/", want: "/a//b/"},
		{name: "leading double slash", target: "//x", want: "//x"},
		{name: "leading double slash with query", target: "//x/y?a=//b", want: "//x/y?a=//b"},
		{name: "leading double slash with encoded slash", target: "//x%2Fy", want: "//x%2Fy"},
		{name: "only slashes", target: "///", want: "///"},
		// No form of url.URL gives this path alone: the absolute form means the same.
		{name: "leading double slash with what net/http would escape", target: "//a|b?c", want: "http://127.0.0.1:1//a|b?c"},
		{name: "dots", target: "/a/../b/./c", want: "/a/../b/./c"},
		{name: "semicolon and colon", target: "/a;b:c", want: "/a;b:c"},
		{name: "bar", target: "/a|b", want: "/a|b"},
		{name: "backslash", target: `/a\b`, want: `/a\b`},
		{name: "quotes and brackets", target: "/\"'<>[]{}^`", want: "/\"'<>[]{}^`"},
		{name: "raw UTF-8", target: "/é/日本", want: "/é/日本"},
		{name: "bytes that are no UTF-8", target: "/\xff\xfe?\xff", want: "/\xff\xfe?\xff"},
		{name: "number sign", target: "/a#b?c#d", want: "/a#b?c#d"},
		{name: "asterisk in a path", target: "/*", want: "/*"},
		{name: "looks like a scheme", target: "/http://x/y", want: "/http://x/y"},
		{name: "asterisk form", method: "OPTIONS", target: "*", want: "*"},
		{name: "asterisk form below a base path", method: "OPTIONS", target: "*", base: "http://127.0.0.1:1/api", want: "*"},
		{name: "absolute form", target: "http://other:9/a|b?c", want: "/a|b?c"},
		{name: "absolute form without a path", target: "http://other", want: "/"},
		{name: "absolute form with a query only", target: "http://other?a/b", want: "/?a/b"},
		{name: "absolute form with a double slash", target: "http://other//a", want: "//a"},
		{name: "absolute form with user", target: "http://u:p@other/a", want: "/a"},

		{name: "base path", target: "/v1?q", base: "http://127.0.0.1:1/api/", want: "/api/v1?q"},
		{name: "base path that is escaped", target: "/v1%2f", base: "http://127.0.0.1:1/a%2Fb", want: "/a%2Fb/v1%2f"},
		{name: "base path and double slash", target: "//x|", base: "http://127.0.0.1:1/api", want: "/api//x|"},
		{name: "base path with a double slash", target: "/x", base: "http://127.0.0.1:1//api", want: "//api/x"},

		{name: "forward proxy", absolute: true, target: "/a?b", want: "http://127.0.0.1:1/a?b"},
		{name: "forward proxy, double slash", absolute: true, target: "//a|b?", want: "http://127.0.0.1:1//a|b?"},
		{name: "forward proxy, base path", absolute: true, target: "/a", base: "http://127.0.0.1:1/api", want: "http://127.0.0.1:1/api/a"},
		{name: "forward proxy, asterisk form (RFC 9112, 3.2.4)", absolute: true, method: "OPTIONS", target: "*", want: "http://127.0.0.1:1"},

		{name: "refused: path that can't be decoded", target: "/%zz", want: "refused"},
		{name: "refused: no path", target: "x", want: "refused"},
		{name: "refused: control characters", target: "/\x01", want: "refused"},
	} {
		t.Run(row.name, func(t *testing.T) {
			method, base := row.method, row.base
			if method == "" {
				method = http.MethodPost
			}
			if base == "" {
				base = "http://127.0.0.1:1"
			}
			got, ok := sentTarget(t, method, row.target, base, row.absolute)
			if !ok {
				got = "refused"
			}
			if got != row.want {
				t.Errorf("%s is sent as %s, want %s", row.target, got, row.want)
			}
		})
	}
}

// TestUpstreamURLOverHTTP2 looks at what HTTP/2 takes its :path from. (End-to-end tests see it on the wire.)
func TestUpstreamURLOverHTTP2(t *testing.T) {
	base, _ := url.Parse("https://api.example.com")
	for _, row := range []struct{ path, query, want string }{
		{"/v1", "a=b", "/v1?a=b"},
		{"/a|b", "", "/a|b?"},
		{"//x", "q", "//x?q"},
		{"*", "", "*?"},
	} {
		url := upstreamURL(base, target{row.path, row.query, true}, false)
		if got := url.RequestURI(); got != row.want {
			t.Errorf("%s: %s, want %s", row.path, got, row.want)
		}
	}
}
