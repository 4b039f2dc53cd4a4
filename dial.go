package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"syscall"
	"time"
)

// upstreamDialer opens connections to the upstream.
type upstreamDialer struct {
	timeout time.Duration // for TCP and TLS together
	dead    time.Duration // a peer that acknowledges nothing for so long is dead
	http1   atomic.Bool   // the newest connection speaks HTTP/1.1
}

// dialError is a connection that did not come about: nothing was sent.
type dialError struct{ error }

// Unwrap gives errors.AsType the cause.
func (e *dialError) Unwrap() error { return e.error }

// Timeout reports whether connect_timeout_secs ran out.
func (e *dialError) Timeout() bool {
	timeout, ok := errors.AsType[net.Error](e.error)
	return ok && timeout.Timeout() // context.DeadlineExceeded is one too
}

// dial opens a connection for plain HTTP, or to a forward proxy.
func (d *upstreamDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d.http1.Store(true)
	return d.connect(ctx, network, addr)
}

// connect opens a TCP connection.
func (d *upstreamDialer) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	probe := d.dead / 4
	dialer := net.Dialer{Timeout: d.timeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: d.dead - 3*probe, Interval: probe, Count: 3,
	}}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, &dialError{err}
	}
	setUserTimeout(conn, d.dead)
	return &upstreamConn{Conn: conn}, nil
}

// dialTLS opens a connection and shakes hands; HTTP/2 if the upstream offers it.
func (d *upstreamDialer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.connect(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, &dialError{err}
	}
	secure := tls.Client(conn, tlsConfig(host))
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, &dialError{fmt.Errorf("TLS handshake with %s: %w", addr, err)}
	}
	d.http1.Store(secure.ConnectionState().NegotiatedProtocol != "h2")
	return secure, nil
}

// tlsConfig prefers HTTP/2, whose pings find dead connections.
func tlsConfig(host string) *tls.Config {
	return &tls.Config{ServerName: host, NextProtos: []string{"h2", "http/1.1"}}
}

// upstreamConn lets the answer of an upstream through that answers and closes before it has read the
// request. On the error of writing to such a connection, net/http would drop the answer that may stand
// in the socket already.
type upstreamConn struct {
	net.Conn
	written    atomic.Int64 // bytes
	unanswered atomic.Bool  // a write was begun since the last byte read
}

// Write implements io.Writer. The peer's closing in the middle of a request is kept back: the
// read that follows tells what really happened.
func (c *upstreamConn) Write(p []byte) (int, error) {
	midway := c.unanswered.Swap(true) // before the answer to p can be read
	n, err := c.Conn.Write(p)
	c.written.Add(int64(n))
	if err != nil && midway && (errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)) {
		return len(p), nil
	}
	return n, err
}

// Read implements io.Reader.
func (c *upstreamConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.unanswered.Store(false)
	}
	return n, err
}

// upstreamConnOf returns the upstreamConn below a connection that net/http uses; nil if there is none.
func upstreamConnOf(conn net.Conn) *upstreamConn {
	if secure, ok := conn.(*tls.Conn); ok {
		conn = secure.NetConn()
	}
	c, _ := conn.(*upstreamConn)
	return c
}
