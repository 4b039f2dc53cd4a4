package main

import (
	"bufio"
	"fmt"
	"net/http"
	"net/textproto"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
)

// TestBetas: the client's come first, as they are, and ours once, if they are not among them. (All other rules, and whatever clients
// send, are FuzzRequestHeader's.)
func TestBetas(t *testing.T) {
	for _, row := range []struct {
		theirs   []string
		injected []string
		want     string
	}{
		{injected: []string{"oauth"}, want: "oauth"},
		{theirs: []string{"b, a", "c"}, injected: []string{"oauth"}, want: "b, a,c,oauth"},
		{theirs: []string{"a, oauth ,b"}, injected: []string{"oauth"}, want: "a, oauth ,b"},
		{theirs: []string{"xoauth,oauthx,OAuth"}, injected: []string{"oauth"}, want: "xoauth,oauthx,OAuth,oauth"},
		{theirs: []string{"b"}, injected: []string{"a", "b"}, want: "b,a"},
		{injected: []string{"a", "a"}, want: "a"},
	} {
		h := http.Header{betaHeader: row.theirs}
		rewriteRequestHeader(h, []header{{betaHeader, row.injected}})
		equal(t, fmt.Sprintf("%q and %q", row.theirs, row.injected), h[betaHeader], []string{row.want})
	}
}

// The rules for headers once more, written from the specification and not from headers.go: as names in small
// letters, in which a header is compared.

// endsHere are the headers that never pass, in either direction (RFC 9110, 7.6.1, and the older ones of its kind).
var endsHere = regexp.MustCompile(`^(connection|http2-settings|keep-alive|proxy-(authenticate|authorization|connection)|te|trailer|transfer-encoding|upgrade)$`)

// clientsEndHere are those that do not pass from a client: what is forgeable, and what is answered here.
var clientsEndHere = regexp.MustCompile(`^(forwarded|x-forwarded-.*|x-real-ip|tailscale-.*|content-length|expect)$`)

// upstreamsEndHere are those that do not pass from the upstream.
var upstreamsEndHere = regexp.MustCompile(`^alt-svc$`)

// lowered returns h with names in small letters. A name that h has twice fails the test.
func lowered(t *testing.T, h http.Header) map[string][]string {
	t.Helper()
	lower := map[string][]string{}
	for name, values := range h {
		key := strings.ToLower(name)
		_, twice := lower[key]
		holds(t, !twice, "%q is there in two spellings", key)
		lower[key] = values
	}
	return lower
}

// passing returns what may pass of h: all but what ends here and what its Connection header names.
func passing(t *testing.T, h http.Header, alsoEndsHere *regexp.Regexp) map[string][]string {
	t.Helper()
	pass := lowered(t, h)
	named := elements(strings.ToLower(strings.Join(pass["connection"], ",")))
	for name := range pass {
		if endsHere.MatchString(name) || alsoEndsHere.MatchString(name) || slices.Contains(named, name) {
			delete(pass, name)
		}
	}
	return pass
}

// elements returns the elements of a comma-separated list (RFC 9110, 5.6.1), without empty ones.
func elements(list string) (all []string) {
	for element := range strings.SplitSeq(list, ",") {
		if element = strings.Trim(element, " \t"); element != "" {
			all = append(all, element)
		}
	}
	return all
}

// readHeader reads header lines as net/http does; ok is false for what it refuses.
func readHeader(lines string) (h http.Header, ok bool) {
	parsed, err := textproto.NewReader(bufio.NewReader(strings.NewReader(lines + "\r\n\r\n"))).ReadMIMEHeader()
	for name := range parsed {
		if !fieldName.MatchString(name) {
			return nil, false
		}
	}
	return http.Header(parsed), err == nil
}

// fieldName is a token (RFC 9110, 5.6.2).
var fieldName = regexp.MustCompile("^" + token + "$")

// FuzzRequestHeader: what is sent upstream is exactly what the client sent, without what ends here, and with what is injected.
func FuzzRequestHeader(f *testing.F) {
	for _, seed := range []string{
		"", "Anthropic-Beta: a,ours-1\nAnthropic-Beta:\n", "Anthropic-Beta: ,\nanthropic-beta: ours-2,ours-2\n", "Connection: a, ,b\nA: 1\nB: 2\n",
		"TE: x\nTailscale-X: y\nX-Forwarded-For: z\n", "tailscale-user-login: x\nFORWARDED: x\nx-real-ip: x\n", "Connection: connection\nUser-Agent: x\n",
		"Connection: anthropic-beta, x-injected\nAnthropic-Beta: a\nX-Injected: theirs\n", "Connection: \tX-Injected\t\nconnection: USER-AGENT\nUser-Agent: x\n",
		"Idempotency-Key: x\nX-IDEMPOTENCY-KEY: y\nExpect: y\nContent-Length: 1\n", "Connection: idempotency-key\nIdempotency-Key: x\n",
		"Keep-Alive: x\nProxy-Authenticate: x\nProxy-Authorization: x\nProxy-Connection: x\nX-Real-Ips: x\nCookie: a=b\nX-Api-Key: k\n",
		"User-Agent:\n", "x y: 1\n", "é: ü\n", "A:\t1 \n  2\n", "Transfer-Encoding: chunked\ntransfer-encoding: x\nTrailer: A\nUpgrade: h2c\nHTTP2-Settings: x\n",
	} {
		f.Add(seed)
	}
	ours, injected := []string{"ours-1", "ours-2"}, []string{"ours"}
	f.Fuzz(func(t *testing.T, lines string) {
		in, ok := readHeader(lines)
		if !ok {
			return
		}
		want := passing(t, in, clientsEndHere)
		theirs := strings.Join(want["anthropic-beta"], ",")
		betas := elements(theirs)
		for _, beta := range ours {
			if !slices.Contains(betas, beta) {
				betas = append(betas, beta)
			}
		}
		want["x-injected"] = []string{"ours"}
		if _, ok := want["user-agent"]; !ok {
			want["user-agent"] = nil // keeps net/http from inventing one
		}

		rewriteRequestHeader(in, []header{{betaHeader, ours}, {"X-Injected", injected}})
		equal(t, "what all requests share", slices.Concat(ours, injected), []string{"ours-1", "ours-2", "ours"})
		got := lowered(t, in)
		list := got["anthropic-beta"]
		holds(t, len(list) == 1 && strings.HasPrefix(list[0], theirs), "betas %q, want one line that begins with the client's %q", list, theirs)
		equal(t, "the betas", elements(strings.Join(list, ",")), betas)
		want["anthropic-beta"] = got["anthropic-beta"]
		equal(t, "sent upstream", got, want)
	})
}

// FuzzResponseHeader: what the client gets is exactly what the upstream sent, without what ends here, and beside what the
// proxy itself says.
func FuzzResponseHeader(f *testing.F) {
	for _, seed := range []string{
		"", "Content-Type: x\nAlt-Svc: h3\n", "Connection: close, X-Hop\nX-Hop: 1\nKeep-Alive: 1\n", "Connection: content-type\nContent-Type: x\n",
		"Set-Cookie: a\nset-cookie: b\nRequest-Id: x\nRetry-After: 1\n", "Transfer-Encoding: chunked\nTrailer: A\nUpgrade: h2c\n", "X-Forwarded-For: x\nTailscale-X: y\n",
		"Connection: connection\n", "Proxy-Authenticate: x\nWWW-Authenticate: y\n", "TE: x\nProxy-Connection: x\nAlt-Svc: clear\nServer: s\nDate: x\n",
		"Content-Encoding: br\nContent-Length: 9\nAnthropic-Ratelimit-Requests-Remaining: 3\nX-Should-Retry: true\nX-Forwarded-Host: x\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, lines string) {
		upstream, ok := readHeader(lines)
		if !ok {
			return
		}
		before := upstream.Clone()
		want := passing(t, upstream, upstreamsEndHere)
		want["connection"] = []string{"close"}
		if _, ok := want["content-type"]; !ok {
			want["content-type"] = nil // keeps net/http from guessing one
		}
		answer := http.Header{"Connection": {"close"}} // as for a request whose length is in doubt
		copyResponseHeader(answer, upstream)
		equal(t, "sent to the client", lowered(t, answer), want)
		equal(t, "the upstream's headers", upstream, before)
	})
}

// FuzzRequestTarget: what the upstream gets is byte for byte what the client sent, behind the upstream's own path.
func FuzzRequestTarget(f *testing.F) {
	ways := []struct {
		http2    bool
		absolute bool // through a forward proxy
		base     string
	}{
		{}, {http2: true}, {base: "/api%2Fv2"}, {http2: true, base: "/api%2Fv2"}, {base: "//api"}, {absolute: true}, {absolute: true, base: "/api"},
	}
	for _, seed := range []string{
		"/", "/v1/messages?beta=true", "//x", "//a|b", "/a%2Fb", "/?a;b=%zz", "/x?", "*", "http://h/p?q", "/é", `/a\b"c`, "//%41", "//", "/?#", "https://u@h?/",
		"/%68ealth", "/health/", "//health", "/a/../b/./c/..", "/\xff\xfe?\x80", "/http://example.com/", "http://h//a|b?", "http://h", "h:1", "*?", "/%zz", "/\x7f",
		"/?", "/x??a?b", "/%41%7e", "/a//b/", "///", "//x/y?a=//b", "//x%2Fy", "/a;b:c", "/\"'<>[]{}^`|?\"'<>[]{}^`|", "/a#b?c#d", "/*", "http://u:p@h:9/a", "http://h?a/b", "x", "/\x01",
	} {
		for way := range ways {
			f.Add(seed, uint8(way))
		}
	}
	f.Fuzz(func(t *testing.T, target string, way uint8) {
		if strings.ContainsAny(target, " \r\n") || (&wireRequest{target: target}).own() {
			return // the first ends the target, the others are the proxy's own
		}
		row := ways[int(way)%len(ways)]
		synctest.Test(t, func(t *testing.T) {
			got := "nothing"
			r := newRig(t, "", func(_ http.ResponseWriter, r *http.Request) { got = r.RequestURI })
			r.overHTTP2(row.http2)
			r.proxy.upstream.absolute = row.absolute
			r.cfg.upstream, _ = url.Parse("http://127.0.0.1:1" + row.base)
			client := r.dialRaw()
			go client.send("OPTIONS " + target + " HTTP/1.1\r\nHost: proxy\r\n\r\n") // the answer tells whether it was read
			answer := client.answer()
			if answer.err == nil && answer.header.Get(requestIDHeader) == "" && got == "nothing" {
				return // net/http refuses it
			}
			want := originForm(target)
			if want != "*" {
				want = row.base + want
			}
			// Some of those that begin with two slashes can be written in the absolute form only, which means the same.
			if rest, absolute := strings.CutPrefix(got, "http://127.0.0.1:1"); absolute && (row.absolute || strings.HasPrefix(want, "//")) {
				got = rest
			} else if row.absolute {
				t.Errorf("%q is sent to a forward proxy as %q", target, got)
			}
			if row.absolute && want == "*" {
				want = "" // RFC 9112, 3.2.4
			}
			holds(t, answer.status == http.StatusOK && got == want, "%+v: %q is sent as %q, want %q; the answer is %+v", row, target, got, want, answer)
		})
	})
}

// originForm returns the path and the query of a target, or "*". (RFC 9112, 3.2.2: of the absolute form the
// authority is cut off, and an empty path is "/".)
func originForm(target string) string {
	if strings.HasPrefix(target, "/") || target == "*" {
		return target
	}
	_, rest, _ := strings.Cut(target, "://")
	end := strings.IndexAny(rest, "/?")
	switch {
	case end < 0:
		return "/"
	case rest[end] == '?':
		return "/" + rest[end:]
	default:
		return rest[end:]
	}
}
