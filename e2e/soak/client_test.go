package soak

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"slices"
	"strconv"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A client sends one request after the other, over one connection as long as that lasts. It writes HTTP by hand, since net/http is
// too polite for some faults.
type client struct {
	addr string
	conn *proxytest.Client // nil if there is none
}

// A result is what a client got for one request.
type result struct {
	status  int    // 0: no answer began
	proxyID string // X-Proxy-Request-Id
	code    string // of an error of the proxy's own; empty: the answer is the upstream's
	bytes   int64  // of the body
	whole   bool   // the answer came to a clean end
	left    bool   // the client has left, or it would have got more
	span           // of the request
}

// do sends the request of p and reads the answer. The error is what is wrong with that.
func (c *client) do(p plan) (got result, err error) {
	got.from = time.Now()
	defer func() {
		got.whole = got.whole && err == nil
		if !got.whole {
			c.hangUp(p)
		}
		got.to = time.Now()
	}()
	if c.conn == nil {
		if c.conn, err = proxytest.Dial(context.Background(), c.addr, nil); err != nil {
			return got, err
		}
	}
	_ = c.conn.SetDeadline(time.Now().Add(patience)) // fails only on a connection that is closed
	sent := c.send(p)                                // may fail because the proxy has answered before the end
	_ = c.conn.SetReadDeadline(time.Now().Add(p.patience))
	if err = c.read(p, &got); err != nil {
		err = fmt.Errorf("%w (sending the request: %v)", err, sent)
	}
	return got, err
}

// hangUp closes the connection, if there is one, in the way of a plan.
func (c *client) hangUp(p plan) {
	if c.conn != nil {
		p.close(c.conn.Conn)
	}
	c.conn = nil
}

// send sends the request of p.
func (c *client) send(p plan) error {
	wire := p.wire(c.addr)
	pieces := 1
	if p.pause > 0 {
		pieces = slowPieces
	}
	for piece := range slices.Chunk(wire, (len(wire)+pieces-1)/pieces) {
		if _, err := c.conn.Write(piece); err != nil {
			return err
		}
		time.Sleep(p.pause)
	}
	return nil
}

// wire is the request of p as the client sends it.
func (p plan) wire(host string) []byte {
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s %s%d HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n%s: %d\r\nContent-Type: application/json\r\n",
		p.method, pathPrefix, p.number, host, authorization, numberHeader, p.number)
	if p.length > 0 {
		fmt.Fprintf(&out, "Content-Length: %d\r\n", p.length)
	}
	body := p.request.bytes()[:p.request.sent]
	if p.chunked {
		out.WriteString("Transfer-Encoding: chunked\r\n\r\n")
		httputil.NewChunkedWriter(&out).Write(body)
	} else {
		out.WriteString("\r\n")
		out.Write(body)
	}
	out.WriteString(p.tail)
	return out.Bytes()
}

// read reads the answer to p's request into got and checks it. A broken answer is no error: what may break is known only to the log.
func (c *client) read(p plan, got *result) error {
	resp, err := http.ReadResponse(c.conn.R, &http.Request{Method: p.method})
	if got.left = err != nil && p.patience < patience; got.left {
		return nil
	}
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	_ = c.conn.SetReadDeadline(time.Now().Add(patience))
	got.status, got.proxyID = resp.StatusCode, resp.Header.Get("X-Proxy-Request-Id")
	id, from := resp.Header.Get("Request-Id"), io.Reader(resp.Body)
	upstreams := strings.HasPrefix(id, "up_")
	if upstreams && p.reads > 0 {
		got.left, from = true, io.LimitReader(from, p.reads)
	}
	body, brokeOff := io.ReadAll(from)
	got.bytes, got.whole = int64(len(body)), brokeOff == nil && !got.left
	switch {
	case !upstreams:
		err = got.checkOwn(p, body)
	case !strings.HasPrefix(id, upstreamID(p.number)):
		err = fmt.Errorf("the answer is that to another request, %s", id)
	default:
		err = got.checkUpstreams(p, resp, body)
	}
	switch {
	case err != nil || !got.whole:
		return err
	case resp.Close:
		c.hangUp(p)
	case c.conn.R.Buffered() > 0:
		return fmt.Errorf("%d bytes behind the answer, which nobody asked for", c.conn.R.Buffered())
	case p.chunked:
		return errors.New("the connection is kept after chunks, which may hide a second request")
	}
	return nil
}

// checkUpstreams checks an answer of the upstream's.
func (got *result) checkUpstreams(p plan, resp *http.Response, body []byte) error {
	want := p.header()
	for _, name := range []string{"Content-Type", "Content-Encoding", "Content-Length", numberHeader} {
		if has := resp.Header.Get(name); has != want.Get(name) {
			return fmt.Errorf("the answer has %s %q, want %q", name, has, want.Get(name))
		}
	}
	ended := got.whole && p.method != http.MethodHead
	if ended && !p.declared && resp.Trailer.Get(numberHeader) != strconv.Itoa(p.number) {
		return fmt.Errorf("the answer has the trailer %v, want the request's number", resp.Trailer)
	}
	return p.answer.check(body, ended)
}

// checkOwn checks an error of the proxy's own, which answers to HEAD have in the log alone.
func (got *result) checkOwn(p plan, raw []byte) error {
	if p.method == http.MethodHead {
		return nil
	}
	var body struct {
		Type      string
		RequestID string `json:"request_id"`
		Error     struct{ Type, Code, Message string }
	}
	err := json.Unmarshal(raw, &body)
	got.code = body.Error.Code
	if err != nil || !got.whole || body.Type != "error" || body.Error.Type != "proxy_error" || got.code == "" ||
		body.Error.Message == "" || body.RequestID != got.proxyID {
		return fmt.Errorf("the proxy's own answer, status %d, id %q, is wrong: %.300q", got.status, got.proxyID, raw)
	}
	return nil
}
