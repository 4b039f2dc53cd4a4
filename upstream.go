package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// retryPause lies between two attempts.
	retryPause = 100 * time.Millisecond
	// maxPatience bounds what a client can ask for with x-stainless-timeout.
	maxPatience = time.Hour
	// upstreamIdle is how long an unused connection is kept. The API's edge closes them at 400 s;
	// closing first avoids the race of a request with that close.
	upstreamIdle = 5 * time.Minute
	// maxUpstreamHeader bounds the headers of one answer, in bytes.
	maxUpstreamHeader = 256 << 10
)

var (
	errHeaderTimeout = errors.New("no response headers in time")
	errSilence       = errors.New("the upstream fell silent")
	errRefused       = errors.New("the upstream refuses the request, or closes each connection before it is sent")
	errLost          = errors.New("the connection was lost before the answer began")
	errInterim       = errors.New("the upstream switched protocols, or ended with an interim status")
)

// upstream is the API that requests are forwarded to.
type upstream struct {
	base      *url.URL
	transport *http.Transport
	dialer    *upstreamDialer
	absolute  bool // requests go to a forward proxy, in the absolute form
}

// newUpstream prepares connections to cfg.upstream; it opens none.
func newUpstream(cfg *config) *upstream {
	ping := min(max(cfg.timeout/4, time.Second), 15*time.Second)
	d := &upstreamDialer{timeout: cfg.connectTimeout, dead: 2 * ping}
	u := &upstream{base: cfg.upstream, dialer: d, transport: &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            d.dial,
		DialTLSContext:         d.dialTLS,
		TLSHandshakeTimeout:    cfg.connectTimeout, // through a forward proxy
		ForceAttemptHTTP2:      true,
		DisableCompression:     true,
		MaxIdleConnsPerHost:    int(cfg.maxConnections),
		IdleConnTimeout:        upstreamIdle,
		MaxResponseHeaderBytes: maxUpstreamHeader,
		HTTP2: &http.HTTP2Config{
			SendPingTimeout:  ping, // a dead connection is found in twice that
			PingTimeout:      ping,
			WriteByteTimeout: cfg.timeout,
		},
	}}
	via, err := http.ProxyFromEnvironment(&http.Request{URL: cfg.upstream})
	u.absolute = cfg.upstream.Scheme == "http" && via != nil && err == nil
	return u
}

// send makes attempts until one brings response headers, and returns that answer. Its body must be
// closed, and x.cancel called after that.
func (p *proxy) send(x *exchange, body *requestBody) (*http.Response, error) {
	header := requestHeader(x.r.Header, p.cfg.headers)
	wait, retries := p.patience(x.r.Header)
	timeouts := 0
	for {
		resp, err := p.attempt(x, header, body, wait)
		switch {
		case err == nil:
			x.ttfb = time.Since(x.start)
			p.metrics.firstByte(x.ttfb)
			x.upstreamRequestID = resp.Header.Get("Request-Id")
			return resp, nil
		case errors.Is(err, errHeaderTimeout) && timeouts < retries:
			timeouts++
			p.upstream.transport.CloseIdleConnections() // they may be as dead as this one
		case isUnsent(err) && x.repeat():
		default:
			return nil, err
		}
		p.metrics.retries.Add(1)
		p.log.Debug("attempt failed, trying again", "request_id", x.id, "attempt", x.attempts, "error", describe(err))
		select {
		case <-time.After(retryPause):
		case <-x.r.Context().Done():
			return nil, departure(x.r.Context())
		}
	}
}

// patience returns how long an attempt waits for response headers, and how many times a timeout is
// retried. Anthropic's SDKs say in a header how long they wait (600 s by default): a non-streaming
// answer sends no headers before it is finished, and repeating it would bill it again.
func (p *proxy) patience(h http.Header) (wait time.Duration, retries int) {
	if p.cfg.honorClientTimeout {
		seconds, err := strconv.ParseUint(h.Get("X-Stainless-Timeout"), 10, 63)
		if errors.Is(err, strconv.ErrRange) {
			seconds, err = uint64(maxPatience/time.Second), nil
		}
		stated := time.Duration(min(seconds, uint64(maxPatience/time.Second))) * time.Second
		if err == nil && stated > p.cfg.timeout {
			return stated, 0
		}
	}
	return p.cfg.timeout, p.cfg.timeoutRetries
}

// attempt sends the request once and waits for response headers. On success x.cancel
// ends the rest of the answer.
func (p *proxy) attempt(x *exchange, header http.Header, body *requestBody, wait time.Duration) (*http.Response, error) {
	x.attempts++
	ctx, cancel := context.WithCancelCause(x.r.Context())
	timer := time.AfterFunc(wait, func() { cancel(errHeaderTimeout) })
	resp, err := p.upstream.transport.RoundTrip(p.upstream.request(ctx, cancel, x, header, body))
	inTime := timer.Stop()
	switch {
	case err == nil && inTime && resp.StatusCode < 200:
		err = errInterim
	case err == nil && inTime:
		x.cancel = cancel
		return resp, nil
	}
	if resp != nil {
		resp.Body.Close()
	}
	cause := context.Cause(ctx)
	cancel(nil)
	switch {
	case x.r.Context().Err() != nil:
		return nil, departure(x.r.Context())
	case cause == errHeaderTimeout:
		return nil, errTimeout(x.attempts, fmt.Errorf("%w: waited %v", errHeaderTimeout, wait))
	case cause != nil:
		err = cause
	}
	return nil, errConnection(err)
}

// silenceWatch cancels an answer when a single read of its body takes longer than limit. The time
// that the client takes to read does not count.
type silenceWatch struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
	start  time.Time
	since  atomic.Int64 // when the present read began, after start; betweenReads if there is none
	silent atomic.Bool
	timer  *time.Timer
}

const betweenReads = -1

// watchSilence starts watching an answer that cancel cancels.
func watchSilence(limit time.Duration, cancel context.CancelCauseFunc) *silenceWatch {
	s := &silenceWatch{limit: limit, cancel: cancel, start: time.Now()}
	s.since.Store(betweenReads)
	s.timer = time.AfterFunc(maxPatience, s.check)
	s.timer.Reset(limit)
	return s
}

// read reads from body into buf.
func (s *silenceWatch) read(body io.Reader, buf []byte) (int, error) {
	s.since.Store(int64(time.Since(s.start)))
	n, err := body.Read(buf)
	s.since.Store(betweenReads)
	return n, err
}

// check runs when a read that began when the timer was set would have taken too long.
func (s *silenceWatch) check() {
	left := s.limit
	if since := s.since.Load(); since != betweenReads {
		left -= time.Since(s.start) - time.Duration(since)
	}
	if left > 0 {
		s.timer.Reset(left)
		return
	}
	s.silent.Store(true)
	s.cancel(errSilence)
}

// broken reports whether the answer was cancelled.
func (s *silenceWatch) broken() bool { return s.silent.Load() }

// stop ends the watch.
func (s *silenceWatch) stop() { s.timer.Stop() }

// request builds what one attempt sends.
func (u *upstream) request(ctx context.Context, cancel context.CancelCauseFunc, x *exchange, header http.Header, body *requestBody) *http.Request {
	path, query, hasQuery := requestTarget(x.r)
	req := &http.Request{
		Method: x.r.Method,
		URL:    upstreamURL(u.base, path, query, hasQuery, u.absolute),
		Host:   u.base.Host,
		Header: header,
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	idempotent := false
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		idempotent = true // in net/http's eyes, which then sends it again on its own
	}
	switch {
	case body != nil && body.size > 0:
		reader := body.open()
		req.Body = reader
		req.ContentLength = body.size
		if !idempotent {
			req.GetBody = func() (io.ReadCloser, error) {
				if reader.begun.Load() && !x.repeat() {
					return nil, errRefused
				}
				reader = body.open()
				return reader, nil
			}
		}
	case !u.dialer.http1.Load():
		ctx = limitSends(ctx, cancel)
	case idempotent:
		ctx = x.repeatUnsent(ctx, req)
	}
	return req.WithContext(ctx)
}

// isUnsent reports whether err proves that nothing of the request reached the upstream and another
// try may help. A dial that timed out has been tried for long enough, and a bad certificate stays bad.
func isUnsent(err error) bool {
	dial, unsent := errors.AsType[*dialError](err)
	_, certificate := errors.AsType[*tls.CertificateVerificationError](err)
	return unsent && !dial.Timeout() && !certificate
}

// repeat allows x one repetition after a connection failure. It is asked by send, and by net/http when
// it knows that nothing of the request was processed: not written to a connection that turned out to
// be closed, or refused by an HTTP/2 peer. net/http alone would go on for a minute.
func (x *exchange) repeat() bool {
	first := !x.repeated
	x.repeated = true
	return first
}

// limitSends is the same for a request without a body over HTTP/2, which net/http sends again, when it was
// refused, without asking for a body: cancel ends the attempt before it is sent for the third time.
func limitSends(ctx context.Context, cancel context.CancelCauseFunc) context.Context {
	var sent atomic.Int32
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteHeaders: func() { sent.Add(1) },
		GotConn: func(httptrace.GotConnInfo) {
			if sent.Load() > 1 {
				cancel(errRefused)
			}
		},
	})
}

// repeatUnsent is the same for an idempotent request without a body over HTTP/1.1, which net/http repeats on
// its own when a used connection breaks, though the upstream may have read it. With a body it has to ask for
// that: so it gets one, which is empty. On the wire nothing changes: net/http looks before the headers go out.
func (x *exchange) repeatUnsent(ctx context.Context, req *http.Request) context.Context {
	var conn *upstreamConn
	var before int64
	req.Body = emptyBody{}
	req.GetBody = func() (io.ReadCloser, error) {
		if conn == nil || conn.written.Load() != before || !x.repeat() {
			return nil, errLost
		}
		return emptyBody{}, nil
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if conn = upstreamConnOf(info.Conn); conn != nil {
				before = conn.written.Load()
			}
		},
	})
}

// emptyBody is a body that net/http can't know to be empty.
type emptyBody struct{}

func (emptyBody) Read([]byte) (int, error) { return 0, io.EOF }
func (emptyBody) Close() error             { return nil }

// upstreamDialer opens connections to the upstream.
type upstreamDialer struct {
	timeout time.Duration // for TCP and TLS together
	dead    time.Duration // a peer that acknowledges nothing for so long is dead
	http1   atomic.Bool   // the newest connection speaks HTTP/1.1
}

// dialError is a connection that did not come about: nothing was sent.
type dialError struct{ error }

// Unwrap gives errors.As the cause.
func (e *dialError) Unwrap() error { return e.error }

// Timeout reports whether connect_timeout_secs ran out.
func (e *dialError) Timeout() bool {
	timeout, ok := errors.AsType[net.Error](e.error)
	return ok && timeout.Timeout() // context.DeadlineExceeded is one too
}

// dial opens a TCP connection.
func (d *upstreamDialer) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	probe := d.dead / 4
	dialer := net.Dialer{Timeout: d.timeout, KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: d.dead - 3*probe, Interval: probe, Count: 3,
	}}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, &dialError{err}
	}
	setUserTimeout(conn, d.dead)
	d.http1.Store(true) // unless dialTLS learns better
	return &upstreamConn{Conn: conn}, nil
}

// dialTLS opens a TCP connection and shakes hands; HTTP/2 if the upstream offers it.
func (d *upstreamDialer) dialTLS(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, d.timeout)
	defer cancel()
	conn, err := d.dial(ctx, network, addr)
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
