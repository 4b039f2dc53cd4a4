package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"
)

const (
	// clientBeta is a beta that clients send and that must survive.
	clientBeta = "interleaved-thinking-2025-05-14"
	// phaseHeader tells the upstream when a stream's first event is due, as a
	// fraction of eventInterval.
	phaseHeader = "X-Bench-Phase"
)

// request returns a request as Anthropic's SDKs write it, ready to be sent. For
// direct it has the beta that otherwise the contestant adds.
func (t *target) request(method, path string, bodySize int, extra ...string) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s?beta=true HTTP/1.1\r\nHost: %s\r\n", method, path, t.addr)
	betas := "claude-code-20250219," + clientBeta
	if t.name == direct {
		betas += "," + beta
	}
	for _, line := range append([]string{
		"accept: application/json",
		"accept-encoding: gzip, deflate, br, zstd",
		"anthropic-beta: " + betas,
		"anthropic-version: 2023-06-01",
		"authorization: Bearer not-a-token-just-as-long-as-one-0123456789-0123456789-0123456789-0123456789",
		"content-type: application/json",
		"user-agent: bench/1.0 (loopback)",
		"x-app: cli",
		"x-stainless-arch: x64",
		"x-stainless-lang: js",
		"x-stainless-os: Linux",
		"x-stainless-retry-count: 0",
		"x-stainless-runtime: node",
		"x-stainless-timeout: 600",
		fmt.Sprintf("content-length: %d", bodySize),
	}, extra...) {
		b.WriteString(line + "\r\n")
	}
	b.WriteString("\r\n")
	b.Write(bytes.Repeat([]byte("x"), bodySize))
	return b.Bytes()
}

// A client is one connection to a target. It speaks HTTP/1.1, as the clients of
// the real proxy do, and does little else: it shares the machine with the target.
type client struct {
	conn net.Conn
	in   *bufio.Reader
}

// dial connects to t.
func (t *target) dial(ctx context.Context) (*client, error) {
	dialer := net.Dialer{Timeout: patience}
	conn, err := dialer.DialContext(ctx, "tcp", t.addr)
	if err != nil {
		return nil, err
	}
	if t.tls != nil {
		conn = tls.Client(conn, t.tls)
	}
	return &client{conn: conn, in: bufio.NewReader(conn)}, nil
}

// send sends a request and waits for the headers of its answer, which has to be a
// good one.
func (c *client) send(request []byte) (*http.Response, error) {
	if _, err := c.conn.Write(request); err != nil {
		return nil, fmt.Errorf("sending a request: %w", err)
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, fmt.Errorf("reading an answer: %w", err)
	}
	switch {
	case resp.StatusCode != http.StatusOK:
		const enough = 500
		body, _ := io.ReadAll(io.LimitReader(resp.Body, enough)) // as far as it tells something
		return nil, fmt.Errorf("status %s: %s", resp.Status, body)
	case resp.Close:
		return nil, fmt.Errorf("the connection is to be closed after an answer, headers %v", resp.Header)
	}
	return resp, nil
}

// do sends a request and reads its answer, whose body has to be of size bytes.
func (c *client) do(request []byte, size int64) error {
	resp, err := c.send(request)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && n != size {
		err = fmt.Errorf("%d bytes, want %d", n, size)
	}
	if err != nil {
		return fmt.Errorf("reading an answer: %w", err)
	}
	return nil
}

// expect bounds what follows to d.
func (c *client) expect(d time.Duration) error { return c.conn.SetDeadline(time.Now().Add(d)) }
