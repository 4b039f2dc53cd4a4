package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// maxGathered is how many bytes may wait to be written to an upstream connection, while as many are under way; beyond it
	// writers wait.
	maxGathered = 128 << 10
	// directWrite is the size in bytes from which a write gains nothing from waiting for others.
	directWrite = 8 << 10
	// closeGrace is how long a connection that is closed gets to write what it has gathered.
	closeGrace = time.Second
)

// upstreamDialer opens connections to the upstream.
type upstreamDialer struct {
	ackTimeout   time.Duration // a peer that acknowledges nothing for so long is taken for dead
	writeTimeout time.Duration // as is one that takes no byte of a write for so long
}

// dialError is a connection that did not come about: nothing was sent.
type dialError struct{ error }

// Unwrap gives errors.AsType the cause.
func (e *dialError) Unwrap() error { return e.error }

// Timeout reports whether the dial took too long: for connect_timeout_secs, a name server, or the kernel.
func (e *dialError) Timeout() bool {
	timeout, ok := errors.AsType[net.Error](e.error)
	return ok && timeout.Timeout() // context.DeadlineExceeded is one too
}

// dial opens a TCP connection, and hands it to whoever asked for it with [withDialed].
func (d *upstreamDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	probe := d.ackTimeout / 4
	dialer := net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: d.ackTimeout - 3*probe, Interval: probe, Count: 3},
		Control:         func(_, _ string, raw syscall.RawConn) error { return raw.Control(d.setUserTimeout) },
	}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return newUpstreamConn(ctx, conn, d.writeTimeout), nil
}

// setUserTimeout has the kernel give a connection up when sent bytes stay unacknowledged, which TCP keep-alives, sent
// only on idle connections, do not notice (RFC 5482). Only Linux has the option.
func (d *upstreamDialer) setUserTimeout(fd uintptr) {
	const tcpUserTimeout = 18 // missing in package syscall
	if runtime.GOOS == "linux" {
		syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(d.ackTimeout.Milliseconds()))
	}
}

// dialTLS opens a connection and shakes hands; HTTP/2 if the upstream offers it.
func (d *upstreamDialer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := d.dial(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	secure := tls.Client(conn, tlsConfig(host))
	if err := secure.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("TLS handshake with %s: %w", addr, err)
	}
	if secure.ConnectionState().NegotiatedProtocol == "h2" {
		conn.(*upstreamConn).gather()
	}
	return secure, nil
}

// tlsConfig prefers HTTP/2, whose pings find dead connections.
func tlsConfig(host string) *tls.Config {
	return &tls.Config{ServerName: host, NextProtos: []string{"h2", "http/1.1"}}
}

// upstreamConn is a connection to the upstream, below TLS. An upstream may answer and close before it has read the whole
// request; on the error of the next write net/http would drop that answer, so push hides the error.
type upstreamConn struct {
	net.Conn
	writeTimeout time.Duration
	written      atomic.Int64 // bytes that were handed over to be sent
	unanswered   atomic.Bool  // a write was begun since the last byte read

	// Over HTTP/2 many requests write to one connection, each its headers and its body, and often at the same time.
	gathered *gatherer // nil otherwise
	closing  atomic.Bool
}

// dialedKey is the context key of a **upstreamConn.
type dialedKey struct{}

// withDialed returns a context for a dial, after which *conn is what it opened, below TLS and a forward proxy's tunnel.
func withDialed(ctx context.Context, conn **upstreamConn) context.Context {
	return context.WithValue(ctx, dialedKey{}, conn)
}

// newUpstreamConn wraps conn, which was dialled under ctx.
func newUpstreamConn(ctx context.Context, conn net.Conn, writeTimeout time.Duration) *upstreamConn {
	c := &upstreamConn{Conn: conn, writeTimeout: writeTimeout}
	if dialed, ok := ctx.Value(dialedKey{}).(**upstreamConn); ok {
		*dialed = c
	}
	return c
}

// gather has writes return before they are done, from now on.
func (c *upstreamConn) gather() {
	c.gathered = newGatherer(maxGathered, func(p []byte) error {
		err := c.pushAll(p)
		if err != nil {
			c.Conn.Close() // ends Read too, with whose error net/http ends all requests
		}
		return err
	})
}

// Write implements io.Writer. With a gatherer, the error may be that of an earlier write.
func (c *upstreamConn) Write(p []byte) (n int, err error) {
	if c.gathered == nil {
		n, err = c.push(p)
		c.written.Add(int64(n))
		return n, err
	}
	c.written.Add(int64(len(p)))
	if busy, _ := c.gathered.state(); busy || len(p) < directWrite {
		err = c.gathered.add(p)
	} else {
		err = c.pushAll(p) // tls.Conn writes one record after the other: none can come between
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// pushAll writes all of p, and goes on for as long as the peer takes some of it.
func (c *upstreamConn) pushAll(p []byte) error {
	for {
		c.Conn.SetWriteDeadline(time.Now().Add(c.writeTimeout))
		n, err := c.push(p)
		if p = p[n:]; n == 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
}

// push writes p. EPIPE and ECONNRESET count as success, and the next Read tells what happened; but not at the first write
// after an answer, without a gatherer: of such a request nothing has gone out, and it can be repeated.
func (c *upstreamConn) push(p []byte) (int, error) {
	midway := c.unanswered.Swap(true) // before the answer to p can be read
	n, err := c.Conn.Write(p)
	if err != nil && (midway || c.gathered != nil) && (errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)) {
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
	if err != nil && c.gathered != nil {
		if _, failed := c.gathered.state(); failed != nil {
			return n, failed // which is why the connection was closed
		}
	}
	return n, err
}

// SetWriteDeadline implements net.Conn. net/http's deadlines are for writes that are done when they return; those of a
// gatherer have their own.
func (c *upstreamConn) SetWriteDeadline(at time.Time) error {
	if c.gathered != nil {
		return nil
	}
	return c.Conn.SetWriteDeadline(at)
}

// Close implements net.Conn. What was gathered gets closeGrace to go out; a second Close does not wait.
func (c *upstreamConn) Close() error {
	if c.gathered != nil && !c.closing.Swap(true) {
		c.gathered.flush(closeGrace)
	}
	return c.Conn.Close()
}
