package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"time"
)

const (
	// authorization is what every request carries.
	authorization = "Bearer not-a-token"
	digestHeader  = "X-Soak-Sha256"
	// patience is how long a client waits for anything that has to happen: longer
	// than a queue of requests that all time out.
	patience = time.Minute
)

// A client sends one request after the other, over one connection as long as that
// lasts. It writes HTTP by hand, since net/http is too polite for some faults.
type client struct {
	addr     string
	problems *problems
	conn     net.Conn // nil if there is none
	in       *bufio.Reader
}

// A result is what a client got for one request.
type result struct {
	number  int
	status  int    // 0: no answer began
	proxyID string // X-Proxy-Request-Id
	code    string // of an error of the proxy's own; empty: the answer is the upstream's
	bytes   int64  // of the body
	whole   bool   // the answer came to a clean end
	left    bool   // the client has left, or it would have got more

	begun, ended time.Time
}

func (r result) String() string {
	return fmt.Sprintf("%s, status %d %s, %d bytes, whole: %v, left: %v", r.proxyID, r.status, r.code, r.bytes, r.whole, r.left)
}

// do sends the request of p and reads the answer.
func (c *client) do(p plan) result {
	got := result{number: p.number, begun: time.Now()}
	err := c.connect()
	if err == nil {
		sent := c.send(p) // an error may be the proxy's answer before the end: if not, there is none
		switch {
		case p.fault == clientLeavesUploading, p.fault == clientLeavesWaiting && !c.answered(p.pause):
			got.left = true
		default:
			if err = c.read(p, &got); err != nil {
				err = fmt.Errorf("%w (sending the request: %v)", err, sent)
			}
		}
	}
	if err != nil {
		c.problems.add("%v: %v", p, err)
		got.whole = false
	}
	if !got.whole || got.left {
		c.hangUp()
	}
	got.ended = time.Now()
	return got
}

// connect opens a connection if there is none.
func (c *client) connect() (err error) {
	if c.conn == nil {
		conn, err := net.DialTimeout("tcp", c.addr, patience)
		if err != nil {
			return err
		}
		c.conn, c.in = conn, bufio.NewReaderSize(conn, 32<<10)
	}
	return c.conn.SetDeadline(time.Now().Add(patience))
}

// hangUp closes the connection if there is one.
func (c *client) hangUp() {
	if c.conn != nil {
		_ = c.conn.Close() // nothing depends on it any more
	}
	c.conn = nil
}

// answered waits for the beginning of an answer.
func (c *client) answered(atMost time.Duration) bool {
	_ = c.conn.SetReadDeadline(time.Now().Add(atMost)) // fails only on a connection that is closed
	_, err := c.in.Peek(1)
	_ = c.conn.SetReadDeadline(time.Now().Add(patience))
	return err == nil
}

// send sends the request of p, as far as its fault lets it. Flush tells of whatever failed before.
func (c *client) send(p plan) error {
	out := bufio.NewWriter(c.conn)
	body := p.request.bytes()
	fmt.Fprintf(out, "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n%s: %s\r\nContent-Type: application/json\r\n",
		p.method, p.path, c.addr, authorization, digestHeader, digest(body))
	if len(body) > 0 && (!p.chunked || p.fault == clientSendsBothFramings) {
		fmt.Fprintf(out, "Content-Length: %d\r\n", len(body))
	}
	if p.fault == clientSendsTwoLengths {
		fmt.Fprintf(out, "Content-Length: %d\r\n", len(body)-1)
	}
	to, end := io.Writer(out), func() {}
	if p.chunked {
		io.WriteString(out, "Transfer-Encoding: chunked\r\n")
		chunks := httputil.NewChunkedWriter(out)
		to, end = chunks, func() { chunks.Close(); io.WriteString(out, "\r\n") } // no trailers
	}
	io.WriteString(out, "\r\n")
	piece := 32 << 10
	if p.fault == clientSendsSlowly {
		piece = (len(body) + slowPieces - 1) / slowPieces
	}
	for rest := body[:p.sends]; len(rest) > 0; {
		part := rest[:min(piece, len(rest))]
		rest = rest[len(part):]
		to.Write(part)
		if p.fault == clientSendsSlowly && len(rest) > 0 && out.Flush() == nil {
			time.Sleep(p.pause)
		}
	}
	switch {
	case p.fault == clientSendsBadChunk:
		io.WriteString(out, "not a size\r\n")
	case p.sends == p.request.size:
		end()
	}
	return out.Flush()
}

// read reads the answer to p's request into got and checks it. A broken answer is
// no error: what may break is known only to the log.
func (c *client) read(p plan, got *result) error {
	resp, err := http.ReadResponse(c.in, &http.Request{Method: p.method})
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	defer resp.Body.Close()
	got.status, got.proxyID = resp.StatusCode, resp.Header.Get("X-Proxy-Request-Id")
	id := resp.Header.Get("Request-Id")
	switch {
	case p.kind == ownEndpoint:
		err = got.readOwn(p, resp)
	case p.fault == clientSendsTwoLengths:
		err = got.readRefusal(resp)
	case id == got.proxyID: // which stands in both where the answer is the proxy's
		err = got.readError(resp)
	case !strings.HasPrefix(id, upstreamID(p.number)):
		err = fmt.Errorf("the answer is that to another request, %s", id)
	default:
		err = c.readUpstream(p, got, resp)
	}
	switch {
	case err != nil || got.left || !got.whole:
		return err
	case resp.Close:
		c.hangUp()
	case c.in.Buffered() > 0:
		return fmt.Errorf("%d bytes behind the answer, which nobody asked for", c.in.Buffered())
	case p.chunked:
		return errors.New("the connection is kept after chunks, which may hide a second request")
	}
	return nil
}

// readUpstream reads an answer of the upstream's.
func (c *client) readUpstream(p plan, got *result, resp *http.Response) error {
	body := &checker{want: p.answer.bytes()}
	declared, sum := int64(-1), ""
	if p.declared {
		declared, sum = p.answer.size, digest(body.want)
	}
	switch h := resp.Header; {
	case h.Get("Content-Type") != p.answer.contentType(), h.Get("Content-Encoding") != p.answer.encoding():
		return fmt.Errorf("the answer has the headers %v", h)
	case resp.ContentLength != declared, h.Get(digestHeader) != sum:
		return fmt.Errorf("the answer declares %d bytes and checksum %q, want %d and %q", resp.ContentLength, h.Get(digestHeader), declared, sum)
	}
	if p.fault == clientLeavesReading {
		io.CopyN(body, resp.Body, p.cut) // an answer that breaks off is noticed by what is missing
		got.left, got.bytes = true, int64(body.n)
		if p.reset {
			resetOnClose(c.conn)
		}
		c.hangUp() // before the body is closed, which would read the rest
		return body.wrong
	}
	_, brokeOff := io.Copy(body, resp.Body)
	got.bytes, got.whole = int64(body.n), brokeOff == nil
	switch {
	case !got.whole, p.method == http.MethodHead:
		return body.wrong
	case !p.declared:
		sum = resp.Trailer.Get(digestHeader)
	}
	return body.whole(sum)
}

// resetOnClose has conn end with a TCP reset.
func resetOnClose(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0) // fails only on a connection that is closed
}

// readError reads an answer of the proxy's own.
func (got *result) readError(resp *http.Response) error {
	raw, err := io.ReadAll(resp.Body)
	got.whole = err == nil
	if err != nil || resp.Request.Method == http.MethodHead { // which has no body: the code is the log's to tell
		return err
	}
	var body struct {
		Type      string
		RequestID string `json:"request_id"`
		Error     struct{ Type, Code, Message string }
	}
	err = json.Unmarshal(raw, &body)
	if got.code = body.Error.Code; err != nil || body.Type != "error" || body.Error.Type != "proxy_error" || got.code == "" ||
		body.Error.Message == "" || body.RequestID != got.proxyID {
		return fmt.Errorf("an error of the proxy's, status %d, for request id %s, is %.300q (%v)", resp.StatusCode, got.proxyID, raw, err)
	}
	return nil
}

// readOwn reads the answer of an endpoint of the proxy's own.
func (got *result) readOwn(p plan, resp *http.Response) error {
	raw, err := io.ReadAll(resp.Body)
	got.whole = err == nil && resp.StatusCode == http.StatusOK && strings.Contains(string(raw), p.shows) && got.proxyID != ""
	if !got.whole {
		return fmt.Errorf("%s: status %d, %v, id %q: %.300q", p.path, resp.StatusCode, err, got.proxyID, raw)
	}
	return nil
}

// readRefusal reads what net/http says of a request that it can't read.
func (got *result) readRefusal(resp *http.Response) error {
	got.whole = resp.StatusCode == http.StatusBadRequest && resp.Close && got.proxyID == ""
	if !got.whole {
		return fmt.Errorf("an ambiguous request is answered with status %d", resp.StatusCode)
	}
	return nil
}
