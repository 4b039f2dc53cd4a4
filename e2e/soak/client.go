package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"
)

const (
	// authorization is what every request carries.
	authorization = "Bearer not-a-token"
	// patience is how long a client waits for anything that has to happen: longer
	// than a queue of requests that all time out.
	patience = time.Minute
	// thinking is how long a client rests between two requests, on average: the
	// machine is to be busy, but no attempt late for lack of a processor.
	thinking = 150 * time.Millisecond
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

// run sends requests until ctx ends; the last one is finished. next returns the
// plans, keep gets the results.
func (c *client) run(ctx context.Context, r *rand.Rand, next func() plan, keep func(result)) {
	defer c.hangUp()
	for ctx.Err() == nil {
		begun := time.Now()
		got := c.do(next())
		got.begun, got.ended = begun, time.Now()
		keep(got)
		select {
		case <-time.After(time.Duration(r.ExpFloat64() * float64(thinking))):
		case <-ctx.Done():
		}
	}
}

// do sends the request of p and reads the answer.
func (c *client) do(p plan) result {
	got := result{number: p.number}
	if err := c.connect(); err != nil {
		c.wrong(p, "connecting: %v", err)
		return got
	}
	sent := c.upload(p) // an error may be the proxy's answer before the end: if not, there is none
	switch {
	case p.fault == clientLeavesUploading:
		got.left = true
	case p.fault == clientLeavesWaiting && !c.answered(p.pause):
		got.left = true
	default:
		if err := c.read(p, &got); err != nil {
			c.wrong(p, "%v (sending the request: %v)", err, sent)
			got.whole = false
		}
	}
	if !got.whole || got.left {
		c.hangUp()
	}
	return got
}

// wrong notes a problem with p's request.
func (c *client) wrong(p plan, format string, args ...any) {
	c.problems.add("%v: %s", p, fmt.Sprintf(format, args...))
}

// connect opens a connection if there is none.
func (c *client) connect() (err error) {
	if c.conn == nil {
		if c.conn, err = net.DialTimeout("tcp", c.addr, patience); err != nil {
			c.conn = nil
			return err
		}
		c.in = bufio.NewReaderSize(c.conn, 32<<10)
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

// header writes the head of p's request.
func header(w io.Writer, p plan, host string) {
	fmt.Fprintf(w, "%s %s HTTP/1.1\r\nHost: %s\r\nAuthorization: %s\r\n%s: %s\r\n",
		p.method, p.path, host, authorization, digestHeader, p.request.digest())
	if p.request.size > 0 {
		io.WriteString(w, "Content-Type: application/json\r\n")
		if !p.chunked || p.fault == clientSendsBothFramings {
			fmt.Fprintf(w, "Content-Length: %d\r\n", p.request.size)
		}
		if p.chunked {
			io.WriteString(w, "Transfer-Encoding: chunked\r\n")
		}
		if p.fault == clientSendsTwoLengths {
			fmt.Fprintf(w, "Content-Length: %d\r\n", p.request.size-1)
		}
	}
	io.WriteString(w, "\r\n")
}
