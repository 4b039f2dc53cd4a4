package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
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
	wait, retries := p.patience(x.r.Header)
	rewriteRequestHeader(x.r.Header, p.cfg.headers, &x.conn.betas)
	x.url = upstreamURL(p.upstream.base, x.target, p.upstream.absolute)
	timeouts := 0
	for {
		resp, err := p.attempt(x, body, wait)
		switch {
		case err == nil:
			x.ttfb = time.Since(x.start)
			p.metrics.firstByte(x.ttfb)
			x.upstreamRequestID = resp.Header.Get("Request-Id")
			return resp, nil
		case errors.Is(err, errHeaderTimeout) && timeouts < retries:
			timeouts++
		case isUnsent(err) && x.repeat():
		default:
			return nil, err
		}
		p.log.Debug("attempt failed, trying again", "request_id", x.id[0], "attempt", x.attempts, "error", describe(err))
		select {
		case <-time.After(retryPause):
			p.metrics.retries.Add(1)
		case <-x.r.Context().Done():
			return nil, departure(x.r.Context())
		}
		if errors.Is(err, errHeaderTimeout) {
			// They may be as dead as this attempt's, which is one of them by now: over HTTP/2 it was not before the pause.
			p.upstream.transport.CloseIdleConnections()
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
func (p *proxy) attempt(x *exchange, body *requestBody, wait time.Duration) (*http.Response, error) {
	x.attempts++
	ctx, cancel := context.WithCancelCause(x.r.Context())
	x.waiting.cancel = cancel
	x.conn.alarm.set(&x.waiting, wait)
	resp, err := p.upstream.transport.RoundTrip(p.upstream.request(ctx, cancel, x, body))
	inTime := x.conn.alarm.clear()
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
	if body != nil {
		body.abandon()
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

// request builds what one attempt sends.
func (u *upstream) request(ctx context.Context, cancel context.CancelCauseFunc, x *exchange, body *requestBody) *http.Request {
	req := &http.Request{
		Method: x.r.Method,
		URL:    &x.url,
		Host:   u.base.Host,
		Header: x.r.Header,
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}
	idempotent := false
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
		idempotent = true // in net/http's eyes, which then sends it again on its own
	}
	switch {
	case body != nil && body.size > 0:
		req.Body = body.open()
		req.ContentLength = body.size
		if !idempotent {
			req.GetBody = x.conn.repeatBody
		}
	case !u.dialer.http1.Load():
		ctx = limitSends(ctx, cancel)
	case idempotent:
		ctx = x.repeatUnsent(ctx, req)
	}
	return req.WithContext(ctx)
}
