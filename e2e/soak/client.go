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
	authorization = "Bearer not-a-token" // of every request
	digestHeader  = "X-Soak-Sha256"      // of every request and answer
	// patience is how long a client waits for anything that has to happen: longer than a queue of requests that all time out.
	patience = time.Minute
)

// A client sends one request after the other, over one connection as long as that lasts. It writes HTTP by hand, since net/http is
// too polite for some faults.
type client struct {
	addr string
	conn net.Conn // nil if there is none
	in   *bufio.Reader
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

// do sends the request of p and reads the answer. The error is what is wrong with that.
func (c *client) do(p plan) (got result, err error) {
	got = result{number: p.number, begun: time.Now()}
	defer func() {
		got.whole = got.whole && err == nil
		if !got.whole || got.left {
			c.hangUp()
		}
		got.ended = time.Now()
	}()
	if c.conn == nil {
		if c.conn, err = net.DialTimeout("tcp", c.addr, patience); err != nil {
			c.conn = nil
			return got, err
		}
		c.in = bufio.NewReader(c.conn)
	}
	_ = c.conn.SetDeadline(time.Now().Add(patience)) // fails only on a connection that is closed
	sent := c.send(p)                                // may fail because the proxy has answered before the end
	if p.fault == clientLeavesUploading || p.fault == clientLeavesWaiting && !c.answered(p.pause) {
		got.left = true
		return got, nil
	}
	if err := c.read(p, &got); err != nil {
		return got, fmt.Errorf("%w (sending the request: %v)", err, sent)
	}
	return got, nil
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
	_ = c.conn.SetReadDeadline(time.Now().Add(atMost)) // as above
	_, err := c.in.Peek(1)
	_ = c.conn.SetReadDeadline(time.Now().Add(patience))
	return err == nil
}

// send sends the request of p, as far as its fault lets it. Flush tells of whatever failed before.
func (c *client) send(p plan) error {
	out, body := bufio.NewWriter(c.conn), p.request.bytes()
	fmt.Fprintf(out, "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n%s: %s\r\nContent-Type: application/json\r\n",
		p.method, p.path, c.addr, authorization, digestHeader, digest(body))
	if len(body) > 0 && (!p.chunked || p.fault == clientSendsBothFramings) {
		fmt.Fprintf(out, "Content-Length: %d\r\n", len(body))
	}
	if p.fault == clientSendsTwoLengths {
		fmt.Fprintf(out, "Content-Length: %d\r\n", len(body)-1)
	}
	to := io.Writer(out)
	if p.chunked {
		io.WriteString(out, "Transfer-Encoding: chunked\r\n")
		to = httputil.NewChunkedWriter(out)
	}
	io.WriteString(out, "\r\n")
	piece := 32 << 10
	if p.fault == clientSendsSlowly {
		piece = (len(body) + slowPieces - 1) / slowPieces
	}
	for rest := body[:p.sends]; len(rest) > 0; {
		n := min(piece, len(rest))
		to.Write(rest[:n])
		rest = rest[n:]
		if p.fault == clientSendsSlowly && len(rest) > 0 && out.Flush() == nil {
			time.Sleep(p.pause)
		}
	}
	switch {
	case p.fault == clientSendsBadChunk:
		io.WriteString(out, "not a size\r\n")
	case p.chunked && p.sends == p.request.size:
		io.WriteString(out, "0\r\n\r\n")
	}
	return out.Flush()
}

// read reads the answer to p's request into got and checks it. A broken answer is no error: what may break is known only to the log.
func (c *client) read(p plan, got *result) error {
	resp, err := http.ReadResponse(c.in, &http.Request{Method: p.method})
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	defer resp.Body.Close()
	got.status, got.proxyID = resp.StatusCode, resp.Header.Get("X-Proxy-Request-Id")
	switch id := resp.Header.Get("Request-Id"); {
	case !strings.HasPrefix(id, "up_"):
		err = got.readOwn(p, resp)
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
	want := p.header(body.want)
	for _, name := range []string{"Content-Type", "Content-Encoding", "Content-Length", digestHeader} {
		if has := resp.Header.Get(name); has != want.Get(name) {
			return fmt.Errorf("the answer has %s %q, want %q", name, has, want.Get(name))
		}
	}
	if p.fault == clientLeavesReading {
		io.CopyN(body, resp.Body, p.cut) // an answer that breaks off is noticed by what is missing
		got.left, got.bytes = true, body.n
		if p.reset {
			resetOnClose(c.conn)
		}
		c.hangUp() // before the body is closed, which would read the rest
		return body.wrong
	}
	_, brokeOff := io.Copy(body, resp.Body)
	got.bytes, got.whole = body.n, brokeOff == nil
	if !got.whole || p.method == http.MethodHead {
		return body.wrong
	}
	return body.whole(resp.Header.Get(digestHeader) + resp.Trailer.Get(digestHeader)) // one of the two has it
}

// resetOnClose has conn end with a TCP reset.
func resetOnClose(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0) // as above
}

// readOwn reads an answer of the proxy's own: of its endpoints, of net/http, which refuses what it can't read, or an error.
func (got *result) readOwn(p plan, resp *http.Response) error {
	raw, err := io.ReadAll(resp.Body)
	switch {
	case p.shows != "":
		got.whole = got.status == http.StatusOK && strings.Contains(string(raw), p.shows) && got.proxyID != ""
	case p.fault == clientSendsTwoLengths:
		got.whole = got.status == http.StatusBadRequest && resp.Close && got.proxyID == ""
	case p.method == http.MethodHead:
		got.whole = true // there is no body: the code is the log's to tell
	default:
		var body struct {
			Type      string
			RequestID string `json:"request_id"`
			Error     struct{ Type, Code, Message string }
		}
		wrong := json.Unmarshal(raw, &body)
		got.code = body.Error.Code
		got.whole = wrong == nil && body.Type == "error" && body.Error.Type == "proxy_error" && got.code != "" &&
			body.Error.Message != "" && body.RequestID == got.proxyID
	}
	if err != nil || !got.whole {
		return fmt.Errorf("the proxy's own answer, status %d, id %q, %v, is wrong: %.300q", got.status, got.proxyID, err, raw)
	}
	return nil
}
