package main

import (
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
)

// betaHeader is the one injected header that is merged with the client's values: it is a
// comma-separated list, and overwriting it would switch off the client's own betas.
const betaHeader = "Anthropic-Beta"

// isHopByHop reports whether the header with the canonical name key concerns one connection only (RFC 9110, 7.6.1):
// it ends here.
func isHopByHop(key string) bool {
	switch key {
	case "Connection", "Http2-Settings", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization",
		"Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

// isForgeable reports whether a client's header claims where a request came from. Anyone can write
// such a header, and what it says of the tailnet is nobody's business upstream.
func isForgeable(key string) bool {
	return key == "Forwarded" || key == "X-Real-Ip" ||
		strings.HasPrefix(key, "X-Forwarded-") || strings.HasPrefix(key, "Tailscale-")
}

// isSessionID reports whether s can be Claude Code's name of a session: what a client chooses goes into the log.
func isSessionID(s string) bool {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	return s != "" && len(s) <= 64 && strings.Trim(s, letters) == ""
}

// header is a header that is set on every request.
type header struct {
	name   string   // canonical
	values []string // one; for [betaHeader], its tokens
}

// rewriteRequestHeader changes a client's headers into those for the upstream, in place: it removes what is hop-by-hop or
// forgeable and adds the injected ones, whose values are shared and never written to.
func rewriteRequestHeader(h http.Header, injected []header) {
	removeNamed(h, h["Connection"])
	for key := range h {
		switch {
		case isHopByHop(key), isForgeable(key):
			delete(h, key)
		case key == "Content-Length", key == "Expect": // net/http's to send, and answered here
			delete(h, key)
		}
	}
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = nil // or else net/http invents one
	}
	for _, add := range injected {
		if add.name == betaHeader {
			h[betaHeader] = mergeList(h[betaHeader], add.values)
		} else {
			h[add.name] = add.values
		}
	}
}

// copyResponseHeader adds an upstream's headers to dst, without the hop-by-hop ones and Alt-Svc.
func copyResponseHeader(dst, upstream http.Header) {
	for key, values := range upstream {
		if isForClient(key) {
			dst[key] = values
		}
	}
	removeNamed(dst, upstream["Connection"])
	if _, ok := dst["Content-Type"]; !ok {
		dst["Content-Type"] = nil // or else net/http guesses one
	}
}

// isForClient reports whether an upstream's header or trailer goes on to the client. Alt-Svc would lead it past the proxy.
func isForClient(key string) bool { return !isHopByHop(key) && key != "Alt-Svc" }

// removeNamed deletes from h the headers that the values of a peer's Connection header name, but for our own Connection.
func removeNamed(h http.Header, connection []string) {
	for _, value := range connection {
		for name := range strings.SplitSeq(value, ",") {
			if key := textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name)); key != "Connection" {
				delete(h, key)
			}
		}
	}
}

// mergeList returns the list header values joined into one line, with those tokens of add appended that it lacks, in order.
// It may write to values, not to add.
func mergeList(values, add []string) []string {
	if len(values) == 0 {
		values = []string{""}
	} else if len(values) > 1 {
		values = []string{strings.Join(values, ",")}
	}
	for _, token := range add {
		switch list := values[0]; {
		case containsToken(list, token):
		case list == "":
			values[0] = token
		default:
			values[0] = list + "," + token
		}
	}
	return values
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

// target is what a request asks for, byte for byte as the client wrote it. r.URL can't be used for
// that: it decodes and re-encodes.
type target struct {
	path, query string
	hasQuery    bool // tells "/a?" from "/a"
}

// requestTarget splits the request line's target into path and query. Of the absolute form
// (RFC 9112, 3.2.2) scheme and authority are cut off.
func requestTarget(r *http.Request) (t target) {
	whole := r.RequestURI
	if !strings.HasPrefix(whole, "/") && whole != "*" {
		_, rest, _ := strings.Cut(whole, "://") // none in CONNECT's authority form, which has no path
		whole = rest[strings.IndexAny(rest+"/", "/?"):]
		if !strings.HasPrefix(whole, "/") {
			whole = "/" + whole
		}
	}
	t.path, t.query, t.hasQuery = strings.Cut(whole, "?")
	return t
}

// upstreamURL returns the URL that net/http renders as exactly t below base. absolute asks for the
// absolute form, which a forward proxy needs for plain http.
func upstreamURL(base *url.URL, t target, absolute bool) url.URL {
	u := url.URL{Scheme: base.Scheme, Host: base.Host, RawQuery: t.query, ForceQuery: t.hasQuery}
	path, asterisk := t.path, t.path == "*"
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

// requestIDHeader names a request in the answer, for the log.
const requestIDHeader = "X-Proxy-Request-Id"

// newRequestID returns "req_" and a random UUID (RFC 9562, version 4).
func newRequestID() string {
	var u [16]byte
	rand.Read(u[:])
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	id := make([]byte, 0, len("req_")+36)
	id = append(id, "req_"...)
	for i, b := range u {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			id = append(id, '-')
		}
		id = hex.AppendEncode(id, []byte{b})
	}
	return string(id)
}
