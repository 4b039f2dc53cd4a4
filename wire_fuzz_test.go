package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// FuzzRequestWire: what a client sends is read in one way only. Each request that RFC 9112 sees in its bytes, and none
// besides, reaches the upstream: once, in order, whole, and answered. Nothing that stands behind an error does.
func FuzzRequestWire(f *testing.F) {
	for _, seed := range wireSeeds() {
		f.Add([]byte(seed), uint8(0))
		f.Add([]byte(seed), uint8(1))
	}
	f.Fuzz(func(t *testing.T, sent []byte, piece uint8) {
		if len(sent) > 4<<10 {
			return // what net/http limits is tested by TestRefusedByServer in e2e
		}
		synctest.Test(t, func(t *testing.T) {
			w := &wire{rig: newRig(t, "max_body_mb = 1", nil)}
			w.serveRaw(w.serveStrictly)
			w.converse(sent, int(piece))
			w.compare(readSent(string(sent)))
			w.expectNothingLeft()
			for _, line := range w.log.lines(t) {
				if line["level"] == "WARN" || line["level"] == "ERROR" {
					t.Errorf("logged: %v", line) // a bug
				}
			}
		})
	})
}

// wire takes bytes through a whole proxy, from a client that knows no HTTP to an upstream that reads it strictly.
type wire struct {
	*rig
	answers []byte        // all that the client got
	arrived []wireRequest // what the upstream got
}

// numberHeader is in each of the upstream's answers: how many requests it has got.
const numberHeader = "X-Upstream-Number"

// serveStrictly is the upstream on one connection. It answers a request that is complete, and accepts only what no other reader can
// take for another one: lines that end in CRLF, one Host, one length at most, and no byte behind it. (checkArrived compares the headers,
// so no Transfer-Encoding is there either.)
func (w *wire) serveStrictly(conn net.Conn) {
	defer conn.Close()
	for text, piece := "", make([]byte, 64<<10); ; {
		n, err := conn.Read(piece)
		text += string(piece[:n])
		s := &sentReader{rest: text}
		r, complete := s.request()
		switch {
		case !complete && err == nil:
			continue
		case !complete && text == "":
			return
		case !complete:
			w.t.Errorf("the upstream gets what is no request: %q, then %v", text, err)
			return
		}
		head := strings.TrimSuffix(strings.TrimSuffix(text, s.rest), r.body)
		host, length := r.header["host"], r.header["content-length"]
		if !strictHead.MatchString(head) || s.rest != "" || !slices.Equal(host, []string{"127.0.0.1:1"}) ||
			length != nil && !slices.Equal(length, []string{strconv.Itoa(len(r.body))}) {
			w.t.Errorf("the upstream gets what is not strictly a request: %q", text)
		}
		delete(r.header, "host")
		delete(r.header, "content-length")
		w.arrived = append(w.arrived, r)
		body := "ok"
		if r.method == http.MethodHead {
			body = ""
		}
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%s: %d\r\nContent-Length: 2\r\n\r\n%s", numberHeader, len(w.arrived), body)
		text = ""
	}
}

// converse sends the client's bytes, piece at a time unless that is 0, and listens until the proxy closes.
func (w *wire) converse(sent []byte, piece int) {
	conn := w.dialRaw()
	if piece == 0 {
		piece = max(len(sent), 1)
	}
	go func() {
		for part := range slices.Chunk(sent, piece) {
			conn.Write(part) // unless the proxy has closed
		}
	}()
	conn.SetReadDeadline(time.Now().Add(clientIdle + w.cfg.timeout)) // the proxy closes an idle connection before
	w.answers = must(io.ReadAll(conn))
}

// compare holds the answers, the log and what reached the upstream against what the client sent.
func (w *wire) compare(sent []wireRequest) {
	answers, forwarded := w.readAnswers(sent), 0
	logged := map[any]logLine{}
	for _, line := range w.log.lines(w.t, "request completed") {
		logged[line["request_id"]] = line
	}
	for i, a := range answers {
		// Each answer has its line, but for those of net/http and of our own endpoints.
		id := a.Header.Get(requestIDHeader)
		line, ok := logged[id]
		holds(w.t, !ok || line["status"] == float64(a.StatusCode), "answer %d, %s, is logged as %v", i+1, a.Status, line)
		holds(w.t, i >= len(sent) || ok == (id != "" && !sent[i].own()), "answer %d, %s, is logged: %t", i+1, a.Status, ok)
		delete(logged, id)
		number := a.Header.Get(numberHeader)
		if number != "" {
			forwarded++
		}
		switch {
		case i > 0 && answers[i-1].Close:
			w.t.Errorf("answer %d, %s, comes after the last one", i+1, a.Status)
		case number != "" && number != strconv.Itoa(forwarded):
			w.t.Errorf("answer %d is number %s of the upstream's, want %d", i+1, number, forwarded)
		case i < len(sent):
			w.checkAnswer(&sent[i], a)
			if number != "" {
				w.checkArrived(&sent[i], &w.arrived[forwarded-1])
			}
		case number != "" || !a.Close:
			w.t.Errorf("answer %d, %s, number %q of the upstream's, is to no request", i+1, a.Status, number)
		}
	}
	equal(w.t, "requests that reached the upstream, by its answers", len(w.arrived), forwarded)
	complete := len(answers) >= len(sent) || len(answers) > 0 && answers[len(answers)-1].Close
	holds(w.t, complete, "%d answers to %d requests", len(answers), len(sent))
	for id, line := range logged {
		w.t.Errorf("the request %s is logged, but not answered: %v", id, line)
	}
}

// readAnswers returns the answers that the client got, without interim ones.
func (w *wire) readAnswers(sent []wireRequest) (answers []*http.Response) {
	reader := bufio.NewReader(bytes.NewReader(w.answers))
	for {
		if _, err := reader.Peek(1); err == io.EOF {
			return answers
		}
		request := &http.Request{Method: http.MethodGet}
		complete := len(answers) < len(sent)
		if complete {
			request.Method = sent[len(answers)].method
		}
		a, err := http.ReadResponse(reader, request)
		if err != nil {
			w.t.Fatalf("answer %d is not HTTP: %v; all that the client got: %q", len(answers)+1, err, w.answers)
		}
		if a.StatusCode == http.StatusContinue {
			continue
		}
		// Who sent half a request does not know what to expect.
		_, err = io.Copy(io.Discard, a.Body)
		holds(w.t, err == nil || !complete, "answer %d, %s, breaks off: %v", len(answers)+1, a.Status, err)
		answers = append(answers, a)
		if a.Header.Get(requestIDHeader) == "" {
			reader.Discard(reader.Buffered()) // net/http refuses HEAD with a body
		}
	}
}

// checkAnswer checks the answer to r.
func (w *wire) checkAnswer(r *wireRequest, a *http.Response) {
	want := http.StatusOK
	if r.method == http.MethodConnect || r.own() && r.method != http.MethodGet && r.method != http.MethodHead {
		want = http.StatusMethodNotAllowed
	}
	upstreams := a.Header.Get(numberHeader) != ""
	switch {
	case r.lax && !upstreams && a.StatusCode >= 400 && a.Close: // refused
	case a.StatusCode != want, upstreams != r.forwarded():
		w.t.Errorf("%v is answered with %s, by the upstream: %t; want %d, %t", *r, a.Status, upstreams, want, r.forwarded())
	case r.last && !a.Close:
		w.t.Errorf("%v is the last request of its connection, but the answer leaves that open", *r)
	case a.Close && !r.last && !r.lax:
		w.t.Errorf("%v is not the last request of its connection, but the answer closes that", *r)
	}
}

// checkArrived checks what has become of r on its way.
func (w *wire) checkArrived(r, got *wireRequest) {
	target, want := got.target, originForm(r.target)
	if strings.HasPrefix(want, "//") {
		target = strings.TrimPrefix(target, "http://127.0.0.1:1") // see FuzzRequestTarget
	}
	holds(w.t, got.method == r.method && target == want && got.body == r.body, "%v reaches the upstream as %v", *r, *got)
	// net/http's server adds Cache-Control to a Pragma that stands alone, and its client sends one User-Agent, unless that is empty.
	header := maps.Clone(r.header)
	if pragma, control := header["pragma"], header["cache-control"]; len(control) == 0 && len(pragma) > 0 && pragma[0] == "no-cache" {
		header["cache-control"] = pragma[:1]
	}
	header = passing(w.t, header, clientsEndHere)
	delete(header, "host")
	if agents := header["user-agent"]; len(agents) > 0 && agents[0] != "" {
		header["user-agent"] = agents[:1]
	} else {
		delete(header, "user-agent")
	}
	header["anthropic-beta"] = got.header["anthropic-beta"] // see FuzzRequestHeader
	equal(w.t, "sent upstream", got.header, header)
	equal(w.t, "lines of betas", len(got.header["anthropic-beta"]), 1)
}

// HTTP/1.1 once more, written from RFC 9112 and not from net/http: how a request reads that a client has sent, and how
// strict one has to be that the proxy sends.

// wireRequest is a request as it stands on a connection.
type wireRequest struct {
	method, target string
	header         map[string][]string // names in small letters
	body           string
	lax            bool // not quite HTTP, or hardly in use: the proxy may refuse it
	last           bool // the connection must be closed after it
}

// String implements fmt.Stringer.
func (r wireRequest) String() string {
	return fmt.Sprintf("%s %q with headers %q and body %q", r.method, r.target, r.header, r.body)
}

// own reports whether the proxy answers r itself.
func (r *wireRequest) own() bool {
	path, _, _ := strings.Cut(originForm(r.target), "?")
	return path == "/health" || path == "/livez" || path == "/metrics"
}

// forwarded reports whether r is to reach the upstream.
func (r *wireRequest) forwarded() bool { return r.method != http.MethodConnect && !r.own() }

// The grammar.
const (
	token   = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
	visible = `[^\x00-\x20\x7f]`
	content = `[^\x00-\x08\x0a-\x1f\x7f]` // of a header's value, blanks included
)

var (
	requestLine = regexp.MustCompile(`^(` + token + `) (` + visible + `*) HTTP/1\.([0-9])\r?\n`)
	fieldLines  = regexp.MustCompile(`^(` + token + `):(` + content + `*(?:\r?\n[ \t]` + content + `*)*)\r?\n`)
	emptyLine   = regexp.MustCompile(`^\r?\n`)
	fold        = regexp.MustCompile(`[ \t]*\r?\n[ \t]+`)
	chunkLine   = regexp.MustCompile(`^([0-9A-Fa-f]{1,16})([ \t]*(?:;[^\r]*)?)\r\n`) // with extensions, which are of no use to anyone
	// Lines that end in LF (2.2), and folded ones (5.2): a server may take them.
	laxLines = regexp.MustCompile(`(^|[^\r])\n|\n[ \t]`)
	// What is written as everybody reads it.
	strictHead = regexp.MustCompile(`^` + token + ` ` + visible + `+ HTTP/1\.1\r\n(` + token + `: (` + visible + `(` + content + `*` + visible + `)?)?\r\n)*\r\n$`)
	// Targets and hosts that nobody may refuse.
	plainTarget = regexp.MustCompile(`^(http://[0-9A-Za-z.-]+(:[0-9]+)?)?/([!$&'()*+,./:;=?@_~0-9A-Za-z-]|%[0-9A-Fa-f]{2})*$`)
	plainHost   = regexp.MustCompile(`^[0-9A-Za-z.-]+(:[0-9]+)?$`)
)

// sentReader reads what a client has sent. It is as strict as RFC 9112 lets a server be, except that it takes what
// net/http takes too: lax lines and equal lengths twice (RFC 9110, 8.6), as the RFC allows; after a POST, of which old
// clients send more than they say (2.2), up to four CR and LF; and CONNECT without a target, which is refused like any other.
type sentReader struct {
	rest string
	lax  bool // one of those was met
}

// readSent returns the requests that are valid and complete, up to the first that is not, or the last of its connection.
func readSent(sent string) (requests []wireRequest) {
	s := &sentReader{rest: sent}
	for {
		s.lax = false
		if n := len(requests); n > 0 && requests[n-1].method == http.MethodPost {
			head := s.rest[:min(4, len(s.rest))]
			skipped := len(head) - len(strings.TrimLeft(head, "\r\n"))
			s.rest, s.lax = s.rest[skipped:], skipped > 0
		}
		r, ok := s.request()
		if !ok {
			return requests
		}
		requests = append(requests, r)
		if r.last {
			return requests
		}
	}
}

// take takes what matches off the beginning, and returns its groups: nil if it does not match.
func (s *sentReader) take(what *regexp.Regexp) []string {
	m := what.FindStringSubmatch(s.rest)
	if m != nil {
		s.rest, s.lax = s.rest[len(m[0]):], s.lax || laxLines.MatchString(m[0])
	}
	return m
}

// request reads a request; ok is false if it is not valid, or not complete.
func (s *sentReader) request() (r wireRequest, ok bool) {
	m := s.take(requestLine)
	if m == nil || m[2] == "" && m[1] != http.MethodConnect {
		return r, false
	}
	r = wireRequest{method: m[1], target: m[2]}
	if r.header, ok = s.fields(); !ok {
		return r, false
	}
	hosts, old := r.header["host"], m[3] == "0"
	plain := plainTarget.MatchString(r.target) || r.target == "*" && r.method == http.MethodOptions
	if r.method == http.MethodConnect {
		plain = plainHost.MatchString(r.target)
	}
	switch {
	case len(hosts) > 1, len(hosts) == 0 && !old && r.method != http.MethodConnect:
		return r, false
	case len(hosts) == 1 && !plainHost.MatchString(hosts[0]), !plain:
		s.lax = true
	}
	if expect := r.header["expect"]; len(expect) > 0 && !strings.EqualFold(expect[0], "100-continue") {
		s.lax = true
	}
	// HTTP/1.0 does not outlive an answer here.
	r.last = old || slices.Contains(elements(strings.ToLower(strings.Join(r.header["connection"], ","))), "close")
	ok = s.body(&r, old)
	r.lax = s.lax
	return r, ok
}

// fields reads header lines and the empty one behind them.
func (s *sentReader) fields() (header map[string][]string, ok bool) {
	header = map[string][]string{}
	for s.take(emptyLine) == nil {
		m := s.take(fieldLines)
		if m == nil {
			return nil, false
		}
		name := strings.ToLower(m[1])
		header[name] = append(header[name], strings.Trim(fold.ReplaceAllString(m[2], " "), " \t"))
	}
	return header, true
}

// body reads r's body (RFC 9112, 6.3). old says that r is HTTP/1.0, which has no transfer codings: one that names
// them is in error about its end, and its connection must be closed (6.1).
func (s *sentReader) body(r *wireRequest, old bool) (ok bool) {
	size := 0
	for i, length := range r.header["content-length"] {
		n, err := strconv.ParseUint(length, 10, 63)
		if err != nil || length != r.header["content-length"][0] {
			return false
		}
		size, s.lax = int(n), s.lax || i > 0
	}
	codings := r.header["transfer-encoding"]
	r.last = r.last || len(codings) > 0
	if len(codings) == 0 || old {
		if size > len(s.rest) {
			return false
		}
		r.body, s.rest = s.rest[:size], s.rest[size:]
		// The proxy does not read on behind a body that it does not read.
		r.last = r.last || size > 0 && !r.forwarded()
		return true
	}
	if len(codings) > 1 || !strings.EqualFold(codings[0], "chunked") {
		return false // others may be valid: the proxy knows none
	}
	_, named := r.header["trailer"]
	s.lax = s.lax || named
	r.body, ok = s.chunks()
	return ok
}

// chunks reads a chunked body (RFC 9112, 7.1).
func (s *sentReader) chunks() (body string, ok bool) {
	for {
		m := s.take(chunkLine)
		if m == nil {
			return body, false
		}
		s.lax = s.lax || m[2] != ""
		size, err := strconv.ParseUint(m[1], 16, 64)
		switch {
		case err != nil, size > uint64(len(s.rest)):
			return body, false
		case size == 0:
			return body, s.trailer()
		}
		body += s.rest[:size]
		if s.rest, ok = strings.CutPrefix(s.rest[size:], "\r\n"); !ok {
			return body, false
		}
	}
}

// trailer reads what follows the last chunk. No server has a use for it, so its lines may be bad ones.
func (s *sentReader) trailer() (ok bool) {
	if rest, ok := strings.CutPrefix(s.rest, "\r\n"); ok {
		s.rest = rest
		return true
	}
	lines, rest, ok := strings.Cut(s.rest, "\r\n\r\n")
	_, valid := (&sentReader{rest: lines + "\r\n\r\n"}).fields()
	s.rest, s.lax = rest, s.lax || !valid
	return ok
}

// wireSeeds are requests that two readers have been known to read in two ways, and plain ones. Most are followed by one
// that must not be seen, or must be seen once.
func wireSeeds() (seeds []string) {
	const (
		host   = "Host: proxy\r\n"
		get    = "GET /a HTTP/1.1\r\n" + host
		post   = "POST /a HTTP/1.1\r\n" + host
		old    = "GET /a HTTP/1.0\r\nConnection: keep-alive\r\n"
		te     = "Transfer-Encoding: chunked\r\n"
		length = "Content-Length: 5\r\n"
		chunks = "5\r\nhello\r\n0\r\n\r\n"
		next   = "GET /next HTTP/1.1\r\n" + host + "\r\n"
	)
	for _, requests := range []string{
		"", next + next, post + length + "\r\nhello", post + te + "\r\n" + chunks, post + "Content-Length: 0\r\n\r\n",
		post + "Anthropic-Beta: a\r\nanthropic-beta: oauth-2025-04-20,b\r\nConnection: x-hop\r\nX-Hop: 1\r\nForwarded: for=1\r\n\r\n", get + "User-Agent: x\r\nPragma: no-cache\r\nCookie: a\r\nCookie: b\r\n\r\n",
		get + "Connection: close\r\n\r\n", post + "Expect: 100-continue\r\n" + length + "\r\nhello", post + "Expect: 200-ok\r\n" + length + "\r\nhello",
		get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n",
		// Both lengths, of which one hides a request; in HTTP/1.0 too, which has no transfer codings.
		post + length + te + "\r\n" + chunks, post + te + "Content-Length: 15\r\n\r\n" + chunks, post + "Content-Length: 6\r\n" + te + "\r\n0\r\n\r\nG",
		post + te + "Content-Length: 4\r\n\r\n2c\r\n" + next + "\r\n0\r\n\r\n", old + "\r\n", old + te + "\r\n", old + te + length + "\r\nhello", "GET /a HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n",
		// What the proxy answers itself.
		"HEAD /health HTTP/1.1\r\n" + host + "\r\n", "POST /metrics HTTP/1.1\r\n" + host + length + "\r\nhello", "GET /livez HTTP/1.1\r\n" + host + te + "\r\n" + chunks,
		"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n" + te + "\r\n", "CONNECT h:443 HTTP/1.1\r\n" + host + length + "\r\nhello", "CONNECT /a HTTP/1.1\r\n" + host + te + "\r\n" + chunks,
		// Lines that end too early, too late, or in other ways.
		"\r\n", post + length + "\r\nhello\r\n\r\n", post + length + "\r\nhello\r\r\n", "POST /a HTTP/1.1\nHost: proxy\n\n", strings.ReplaceAll(next, "\r\n", "\r"), post + "A: b\n" + te + "\n" + chunks,
		"POST /a HTTP/1.1\r\n " + te + host + "\r\n" + chunks, "GET /a\r\n", "GET /a HTTP/1.1\r\n\r\n", get + host + "\r\n", "GET /a HTTP/1.1\r\nHost:\r\n\r\n", "GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	} {
		seeds = append(seeds, requests+next)
	}
	for _, line := range []string{
		"HEAD /a HTTP/1.1", "OPTIONS * HTTP/1.1", "GET * HTTP/1.1", "GET http://h/a HTTP/1.1", "GET h:80 HTTP/1.1", "CONNECT h:443 HTTP/1.1", "CONNECT  HTTP/1.1", "GET /a HTTP/1.1 ", "GET  /a HTTP/1.1", "GET /a b HTTP/1.1",
		"GET /a\tHTTP/1.1", "GET //a|b?c HTTP/1.1", "GET /%zz HTTP/1.1", "GET /a HTTP/1.9", "GET /a HTTP/2.0", "PRI * HTTP/2.0", "GET /a HTTP/0.9", "GET /a http/1.1", "get /a HTTP/1.1", "G\x80T /a HTTP/1.1",
		"GET /\x00 HTTP/1.1",
	} {
		seeds = append(seeds, line+"\r\n"+host+"\r\n"+next)
	}
	for _, body := range []string{
		"5;x=\"y\"\r\nhello\r\n0;z\r\n\r\n", "05\r\nhello\r\n00\r\n\r\n", "5 \r\nhello\r\n0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n", "-5\r\nhello\r\n0\r\n\r\n", "10000000000000005\r\nhello\r\n0\r\n\r\n",
		"fffffffffffffffe\r\nhello\r\n0\r\n\r\n", "5\nhello\r\n0\r\n\r\n", "5;\nhello\r\n0\r\n\r\n", "5\r\nhelloX\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0\r\n", "5\r\nhello\r\n0\n\n", "\r\n",
		"0\r\n\r\n0\r\n\r\n", "0\r\nContent-Length: 3\r\nHost: x\r\n\r\n", "0\r\nA: b\n\n", "0\r\nA B\r\n\r\n",
	} {
		seeds = append(seeds, post+te+"\r\n"+body+next)
	}
	// Codings that some take for chunked, lengths that some take for a number, and other lines that are read in two ways.
	for _, line := range []string{
		"Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", " Transfer-Encoding: chunked", "Transfer-Encoding:\tchunked", "Transfer-Encoding: \x0bchunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: x",
		te + "Transfer-Encoding: chunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding:", "Transfer-Encoding:\r\n chunked",
		"Transfer-Encoding: \"chunked\"", "transfer-encoding: CHUNKED", "Transfer_Encoding: chunked", "Transfer-Encoding: chunked;q=1", "X: y\rTransfer-Encoding: chunked", "Transfer-Encoding\n: chunked",
		"Connection: transfer-encoding\r\nTransfer-Encoding: chunked", "Content-Length: 5", "Content-Length: 5\r\nContent-Length: 0", "Content-Length: 5, 5", "Content-Length: +5", "Content-Length: -5",
		"Content-Length: 0x5", "Content-Length: 005", "Content-Length: 5 ", "Content-Length: 5 5", "Content-Length: \x0c5", "Content-Length: 5;", "Content-Length:", "Content-Length: 18446744073709551621",
		"Content-Length: 9223372036854775807", "Content-Length: 1048577", "Content_Length: 5", "Content-Length : 5", "Content-Length: 5.0", "Content-Length: \u0665", "Content-Length:\r\n 5", "A: b\r\r\n", "A: b\x00",
		"A\x00: b", "A b: c", ": x", "A", "A: b\r\n c\r\n\t d \r\n ",
	} {
		seeds = append(seeds, post+line+"\r\n\r\n"+chunks+next, post+length+line+"\r\n\r\nhello"+next)
	}
	// Those that end in the middle.
	return append(seeds, get, post+length+"\r\nhell", post+te+"\r\n5\r\nhell", post+"Expect: 200-ok\r\n"+length+"\r\nhell")
}
