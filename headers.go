package main

import (
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
)

// betaHeader is the one injected header that is merged with the client's values: it is a
// comma-separated list, and overwriting it would switch off the client's own betas.
const betaHeader = "Anthropic-Beta"

// hopByHop are the headers that concern one connection only (RFC 9110, 7.6.1) and end here.
var hopByHop = []string{
	"Connection", "Http2-Settings", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
	"Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
}

// isHopByHop reports whether the canonical header name key concerns one connection only.
func isHopByHop(key string) bool { return slices.Contains(hopByHop, key) }

// isForgeable reports whether a client's header claims where a request came from. Anyone can write
// such a header, and what it says of the tailnet is nobody's business upstream.
func isForgeable(key string) bool {
	return key == "Forwarded" || key == "X-Real-Ip" ||
		strings.HasPrefix(key, "X-Forwarded-") || strings.HasPrefix(key, "Tailscale-")
}

// requestHeader returns the headers to send upstream: the client's, without those that end here,
// and with the injected ones. Values are shared with in, which is left as it is.
func requestHeader(in http.Header, injected []header) http.Header {
	out := make(http.Header, len(in)+len(injected)+1)
	for key, values := range in {
		switch {
		case isHopByHop(key), isForgeable(key):
		case key == "Content-Length", key == "Expect": // net/http's to send, and answered here
		default:
			out[key] = values
		}
	}
	removeNamed(out, in["Connection"])
	if _, ok := out["User-Agent"]; !ok {
		out["User-Agent"] = nil // or else net/http invents one
	}
	for _, h := range injected {
		if h.name == betaHeader {
			out[betaHeader] = mergeList(out[betaHeader], h.values)
		} else {
			out[h.name] = h.values
		}
	}
	for _, key := range [...]string{"Idempotency-Key", "X-Idempotency-Key"} {
		if values, ok := out[key]; ok {
			// In small letters net/http does not recognise it, and so does not take it as leave to
			// send again what the upstream may have read already.
			delete(out, key)
			out[strings.ToLower(key)] = values
		}
	}
	return out
}

// copyResponseHeader adds an upstream's headers to dst, without those that end here.
func copyResponseHeader(dst, upstream http.Header) {
	for key, values := range upstream {
		if !isHopByHop(key) && key != "Alt-Svc" { // Alt-Svc would lead clients past the proxy
			dst[key] = values
		}
	}
	removeNamed(dst, upstream["Connection"])
	if _, ok := dst["Content-Type"]; !ok {
		dst["Content-Type"] = nil // or else net/http guesses one
	}
}

// removeNamed deletes from h the headers that the values of a Connection header name.
func removeNamed(h http.Header, connection []string) {
	for _, value := range connection {
		for name := range strings.SplitSeq(value, ",") {
			delete(h, textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name)))
		}
	}
}

// mergeList returns the list header values joined into one line, with those tokens of add
// appended that it lacks. Order is kept.
func mergeList(values, add []string) []string {
	joined := strings.Join(values, ",")
	if len(values) == 1 {
		joined = values[0]
	}
	for _, token := range add {
		if !containsToken(joined, token) {
			if joined != "" {
				joined += ","
			}
			joined += token
		}
	}
	return []string{joined}
}

// containsToken reports whether the comma-separated list has the element token.
func containsToken(list, token string) bool {
	for element := range strings.SplitSeq(list, ",") {
		if textproto.TrimString(element) == token {
			return true
		}
	}
	return false
}

// requestTarget splits the request line's target into the path and query that the client wrote,
// byte for byte. r.URL can't be used: it decodes and re-encodes. For the absolute form
// (RFC 9112, 3.2.2) scheme and authority are cut off; hasQuery tells "/a?" from "/a".
func requestTarget(r *http.Request) (path, query string, hasQuery bool) {
	target := r.RequestURI
	if !strings.HasPrefix(target, "/") && target != "*" {
		_, rest, _ := strings.Cut(target, "://") // none in CONNECT's authority form, which has no path
		target = rest[strings.IndexAny(rest+"/", "/?"):]
		if !strings.HasPrefix(target, "/") {
			target = "/" + target
		}
	}
	return strings.Cut(target, "?")
}

// upstreamURL returns the URL that net/http renders as exactly the given target below base.
// absolute asks for the absolute form, which a forward proxy needs for plain http.
func upstreamURL(base *url.URL, path, query string, hasQuery, absolute bool) *url.URL {
	u := &url.URL{Scheme: base.Scheme, Host: base.Host, RawQuery: query, ForceQuery: hasQuery}
	asterisk := path == "*"
	if !asterisk {
		path = base.EscapedPath() + path
	}
	switch {
	case absolute && asterisk:
		u.Opaque = "//" + base.Host // RFC 9112, 3.2.4
	case absolute:
		u.Opaque = "//" + base.Host + path
	case strings.HasPrefix(path, "//"):
		// An opaque value with two slashes would be taken for an authority.
		u.Path, _ = url.PathUnescape(path)
		u.RawPath = path
		if u.EscapedPath() != path { // net/http would re-escape it: only the absolute form keeps it
			u.Opaque = "//" + base.Host + path
		}
	default:
		u.Opaque = path
	}
	return u
}
