package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"reflect"
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
			w := newWire(t)
			w.converse(sent, int(piece))
			w.compare(readSent(string(sent)))
			w.aftermath()
		})
	})
}

// wire takes bytes through a whole proxy, from a client that knows no HTTP to an upstream that reads it strictly.
type wire struct {
	*rig
	answers []byte        // all that the client got
	arrived []wireRequest // what the upstream got
}

// newWire starts a proxy in front of a strict upstream.
func newWire(t *testing.T) *wire {
	w := &wire{rig: newRig(t, "max_body_mb = 1", nil)}
	w.wrap = func(_ int, conn net.Conn) (net.Conn, error) {
		conn.Close() // this one leads to an http.Server
		here, there := net.Pipe()
		go w.serveStrictly(there)
		return here, nil
	}
	return w
}

// numberHeader is in each of the upstream's answers: how many requests it has got.
const numberHeader = "X-Upstream-Number"

// serveStrictly is the upstream on one connection: it answers when a request is complete.
func (w *wire) serveStrictly(conn net.Conn) {
	defer conn.Close()
	reader := bufio.NewReader(conn)
	for {
		r, err := readArrived(reader)
		if err == io.EOF {
			return
		}
		if err != nil {
			w.t.Errorf("the upstream gets what is not strictly a request: %v", err)
			return
		}
		w.arrived = append(w.arrived, r)
		body := "ok"
		if r.method == http.MethodHead {
			body = ""
		}
		fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\n%s: %d\r\nContent-Length: 2\r\n\r\n%s", numberHeader, len(w.arrived), body)
	}
}

// converse sends the client's bytes, piece at a time unless that is 0, and listens until the proxy closes.
func (w *wire) converse(sent []byte, piece int) {
	conn, err := w.front.dial(context.Background(), "", "")
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close()
	if piece == 0 {
		piece = max(len(sent), 1)
	}
	go func() {
		for part := range slices.Chunk(sent, piece) {
			if _, err := conn.Write(part); err != nil {
				return // the proxy has closed
			}
		}
	}()
	conn.SetReadDeadline(time.Now().Add(clientIdle + w.cfg.timeout))
	if w.answers, err = io.ReadAll(conn); err != nil {
		w.t.Errorf("the proxy does not close an idle connection: %v", err)
	}
}

// compare holds the answers and what reached the upstream against what the client sent.
func (w *wire) compare(sent []wireRequest) {
	w.t.Helper()
	answers, forwarded := w.readAnswers(sent), 0
	for i, a := range answers {
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
	if len(w.arrived) != forwarded {
		w.t.Errorf("%d requests reached the upstream, and %d of its answers the client: %v", len(w.arrived), forwarded, w.arrived)
	}
	if n := len(answers); n < len(sent) && (n == 0 || !answers[n-1].Close) {
		w.t.Errorf("%d answers to %d requests", n, len(sent))
	}
	w.compareLog(sent, answers)
}

// compareLog holds the log against the answers: each has its line, but for those of net/http and of our own endpoints.
func (w *wire) compareLog(sent []wireRequest, answers []*http.Response) {
	w.t.Helper()
	logged := map[any]logLine{}
	for _, line := range w.log.lines(w.t, "request completed") {
		logged[line["request_id"]] = line
	}
	for i, a := range answers {
		id := a.Header.Get(requestIDHeader)
		line, ok := logged[id]
		if ok && line["status"] != float64(a.StatusCode) {
			w.t.Errorf("answer %d, %s, is logged as %v", i+1, a.Status, line)
		}
		if i < len(sent) && ok != (id != "" && !sent[i].own()) {
			w.t.Errorf("answer %d, %s, to %v: logged %t", i+1, a.Status, sent[i], ok)
		}
		delete(logged, id)
	}
	if len(logged) > 0 {
		w.t.Errorf("logged, but not answered: %v", logged)
	}
}

// readAnswers returns the answers that the client got, without interim ones.
func (w *wire) readAnswers(sent []wireRequest) (answers []*http.Response) {
	w.t.Helper()
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
		if _, err := io.Copy(io.Discard, a.Body); err != nil && complete {
			w.t.Errorf("answer %d, %s, breaks off: %v", len(answers)+1, a.Status, err)
		}
		answers = append(answers, a)
		if a.Header.Get(requestIDHeader) == "" {
			reader.Discard(reader.Buffered()) // net/http refuses HEAD with a body
		}
	}
}

// checkAnswer checks the answer to r.
func (w *wire) checkAnswer(r *wireRequest, a *http.Response) {
	w.t.Helper()
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
	w.t.Helper()
	target := got.target
	if want := originForm(r.target); strings.HasPrefix(want, "//") {
		target = strings.TrimPrefix(target, "http://127.0.0.1:1") // see FuzzRequestTarget
	}
	if got.method != r.method || target != originForm(r.target) || got.body != r.body {
		w.t.Errorf("%v reaches the upstream as %v", *r, *got)
	}
	want := passingOn(w.t, r.header)
	betas := elements(strings.Join(want["anthropic-beta"], ","))
	if beta := w.cfg.headers[0].values[0]; !slices.Contains(betas, beta) {
		betas = append(betas, beta)
	}
	if list := got.header["anthropic-beta"]; len(list) != 1 || !slices.Equal(elements(list[0]), betas) {
		w.t.Errorf("betas %q, want one line with %q", list, betas)
	}
	want["anthropic-beta"] = got.header["anthropic-beta"]
	if !reflect.DeepEqual(got.header, want) {
		w.t.Errorf("sent upstream: %q\nwant:          %q", got.header, want)
	}
}

// passingOn returns what may pass of a client's headers, with what net/http does to them: its server adds Cache-Control
// to a Pragma that stands alone, and its client sends one User-Agent, unless that is empty.
func passingOn(t *testing.T, h map[string][]string) map[string][]string {
	t.Helper()
	h = maps.Clone(h)
	if pragma, control := h["pragma"], h["cache-control"]; len(control) == 0 && len(pragma) > 0 && pragma[0] == "no-cache" {
		h["cache-control"] = pragma[:1]
	}
	pass := passing(t, h, clientsEndHere)
	delete(pass, "host")
	if agents := pass["user-agent"]; len(agents) > 0 && agents[0] != "" {
		pass["user-agent"] = agents[:1]
	} else {
		delete(pass, "user-agent")
	}
	return pass
}

// aftermath checks that nothing is left of the requests, and that none has met a bug.
func (w *wire) aftermath() {
	w.t.Helper()
	synctest.Wait()
	for name, g := range map[string]*gate{"places": w.proxy.places, "bytes": w.proxy.bodies.budget} {
		if taken, waiting := g.load(); taken != 0 || waiting != 0 {
			w.t.Errorf("%d %s are taken, and %d requests wait for them", taken, name, waiting)
		}
	}
	if n := w.proxy.active.Load(); n != 0 {
		w.t.Errorf("%d requests are left", n)
	}
	for _, line := range w.log.lines(w.t) {
		if line["level"] == "WARN" || line["level"] == "ERROR" {
			w.t.Errorf("logged: %v", line)
		}
	}
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
		"", next + next, post + length + "\r\nhello", post + te + "\r\n" + chunks,
		post + "Anthropic-Beta: a\r\nanthropic-beta: oauth-2025-04-20,b\r\nConnection: x-hop\r\nX-Hop: 1\r\nForwarded: for=1\r\n\r\n",
		get + "User-Agent: x\r\nPragma: no-cache\r\nCookie: a\r\nCookie: b\r\n\r\n", post + "Content-Length: 0\r\n\r\n",
		post + "Expect: 100-continue\r\n" + length + "\r\nhello", post + "Expect: 200-ok\r\n" + length + "\r\nhello",
		get + "Connection: close\r\n\r\n", get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n\r\n",

		// Both lengths, of which one hides a request; in HTTP/1.0 too, which has no transfer codings.
		post + length + te + "\r\n" + chunks, post + te + "Content-Length: 15\r\n\r\n" + chunks,
		post + "Content-Length: 6\r\n" + te + "\r\n0\r\n\r\nG",
		post + te + "Content-Length: 4\r\n\r\n2c\r\n" + next + "\r\n0\r\n\r\n",
		old + "\r\n", old + te + "\r\n", old + te + length + "\r\nhello",
		"GET /a HTTP/1.0\r\nConnection: close, keep-alive\r\n\r\n",

		// What the proxy answers itself.
		"HEAD /health HTTP/1.1\r\n" + host + "\r\n", "POST /metrics HTTP/1.1\r\n" + host + length + "\r\nhello",
		"GET /livez HTTP/1.1\r\n" + host + te + "\r\n" + chunks, "GET /health HTTP/1.0\r\nConnection: keep-alive\r\n" + te + "\r\n",
		"CONNECT h:443 HTTP/1.1\r\n" + host + length + "\r\nhello", "CONNECT /a HTTP/1.1\r\n" + host + te + "\r\n" + chunks,

		// Lines that end too early, too late, or in other ways.
		"\r\n", post + length + "\r\nhello\r\n\r\n", post + length + "\r\nhello\r\r\n", strings.ReplaceAll(post+"\r\n",
			"\r\n", "\n"),
		strings.ReplaceAll(next, "\r\n", "\r"), post + "A: b\n" + te + "\n" + chunks,
		"POST /a HTTP/1.1\r\n " + te + host + "\r\n" + chunks,
		"GET /a\r\n", "GET /a HTTP/1.1\r\n\r\n",
		get + host + "\r\n", "GET /a HTTP/1.1\r\nHost:\r\n\r\n", "GET /a HTTP/1.1\r\nHost: a/b\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
	} {
		seeds = append(seeds, requests+next)
	}
	for _, line := range []string{
		"HEAD /a HTTP/1.1", "OPTIONS * HTTP/1.1", "GET * HTTP/1.1", "GET http://h/a HTTP/1.1", "GET h:80 HTTP/1.1",
		"CONNECT h:443 HTTP/1.1",
		"CONNECT  HTTP/1.1", "GET /a HTTP/1.1 ", "GET  /a HTTP/1.1", "GET /a b HTTP/1.1", "GET /a\tHTTP/1.1",
		"GET //a|b?c HTTP/1.1",
		"GET /%zz HTTP/1.1", "GET /a HTTP/1.9", "GET /a HTTP/2.0", "PRI * HTTP/2.0", "GET /a HTTP/0.9", "GET /a http/1.1",
		"get /a HTTP/1.1",
		"G\x80T /a HTTP/1.1", "GET /\x00 HTTP/1.1",
	} {
		seeds = append(seeds, line+"\r\n"+host+"\r\n"+next)
	}
	for _, body := range []string{
		"5;x=\"y\"\r\nhello\r\n0;z\r\n\r\n", "05\r\nhello\r\n00\r\n\r\n", "5 \r\nhello\r\n0\r\n\r\n",
		"0x5\r\nhello\r\n0\r\n\r\n", "-5\r\nhello\r\n0\r\n\r\n",
		"10000000000000005\r\nhello\r\n0\r\n\r\n", "fffffffffffffffe\r\nhello\r\n0\r\n\r\n", "5\nhello\r\n0\r\n\r\n",
		"5;\nhello\r\n0\r\n\r\n",
		"5\r\nhelloX\r\n0\r\n\r\n", "5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0\r\n", "5\r\nhello\r\n0\n\n", "\r\n",
		"0\r\n\r\n0\r\n\r\n",
		"0\r\nContent-Length: 3\r\nHost: x\r\n\r\n", "0\r\nA: b\n\n", "0\r\nA B\r\n\r\n",
	} {
		seeds = append(seeds, post+te+"\r\n"+body+next)
	}
	// Codings that some take for chunked, lengths that some take for a number, and other lines that are read in two ways.
	for _, line := range []string{
		"Transfer-Encoding: xchunked", "Transfer-Encoding : chunked", " Transfer-Encoding: chunked", "Transfer-Encoding:\tchunked",
		"Transfer-Encoding: \x0bchunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: x", te + "Transfer-Encoding: chunked",
		"Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity", "Transfer-Encoding: gzip, chunked",
		"Transfer-Encoding:",
		"Transfer-Encoding:\r\n chunked", "Transfer-Encoding: \"chunked\"", "transfer-encoding: CHUNKED",
		"Transfer_Encoding: chunked",
		"Transfer-Encoding: chunked;q=1", "X: y\rTransfer-Encoding: chunked", "Transfer-Encoding\n: chunked",
		"Connection: transfer-encoding\r\nTransfer-Encoding: chunked",
		"Content-Length: 5", "Content-Length: 5\r\nContent-Length: 0", "Content-Length: 5, 5", "Content-Length: +5",
		"Content-Length: -5",
		"Content-Length: 0x5", "Content-Length: 005", "Content-Length: 5 ", "Content-Length: 5 5", "Content-Length: \x0c5",
		"Content-Length: 5;",
		"Content-Length:", "Content-Length: 18446744073709551621", "Content-Length: 9223372036854775807", "Content-Length: 1048577",
		"Content_Length: 5", "Content-Length : 5", "Content-Length: 5.0", "Content-Length: \u0665", "Content-Length:\r\n 5",
		"A: b\r\r\n", "A: b\x00", "A\x00: b", "A b: c", ": x", "A", "A: b\r\n c\r\n\t d \r\n ",
	} {
		seeds = append(seeds, post+line+"\r\n\r\n"+chunks+next, post+length+line+"\r\n\r\nhello"+next)
	}
	// Those that end in the middle.
	return append(seeds, get, post+length+"\r\nhell", post+te+"\r\n5\r\nhell", post+"Expect: 200-ok\r\n"+length+"\r\nhell")
}
