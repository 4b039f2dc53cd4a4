package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// retryPause lies between two attempts.
	retryPause = 100 * time.Millisecond
	// maxPatience bounds what a client can ask for.
	maxPatience = time.Hour
	// sdkPatience is how long Anthropic's SDKs wait if they don't say.
	sdkPatience = 600 * time.Second
	// maxUpstreamHeader bounds the headers of one answer, in bytes.
	maxUpstreamHeader = 256 << 10
	// maxAhead bounds what an upstream sends ahead of a slow reader, in bytes a stream.
	maxAhead = 256 << 10
)

var (
	errHeaderTimeout = errors.New("no response headers in time")
	errSilence       = errors.New("the upstream fell silent")
	errInterim       = errors.New("the upstream switched protocols, or ended with an interim status")
)

// upstream is the API that requests are forwarded to.
type upstream struct {
	cfg      *config
	pool     *pool
	absolute bool // requests go to a forward proxy, in the absolute form
}

// newUpstream prepares connections to cfg.upstream; it opens none.
func newUpstream(cfg *config) *upstream {
	ping := min(max(cfg.timeout/4, time.Second), 15*time.Second)
	dialer := &upstreamDialer{ackTimeout: 2 * ping, writeTimeout: cfg.timeout}
	base := cfg.upstream
	via, err := http.ProxyFromEnvironment(&http.Request{URL: base})
	return &upstream{
		cfg:      cfg,
		absolute: base.Scheme == "http" && via != nil && err == nil,
		// net/http knows the default port.
		pool: newPool(base.Scheme, net.JoinHostPort(base.Hostname(), base.Port()), cfg.connectTimeout, &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            dialer.dial,
			DialTLSContext:         dialer.dialTLS,
			ForceAttemptHTTP2:      true,
			DisableCompression:     true,
			MaxResponseHeaderBytes: maxUpstreamHeader,
			HTTP2: &http.HTTP2Config{
				SendPingTimeout:           ping, // a dead connection is found in twice that
				PingTimeout:               ping,
				WriteByteTimeout:          cfg.timeout, // through a forward proxy; other connections see to it themselves
				MaxReceiveBufferPerStream: maxAhead,
			},
		}),
	}
}

// outgoing is a request on its way upstream.
type outgoing struct {
	*http.Request              // the client's, whose headers are taken over
	target        target       // what it asks for
	body          *requestBody // nil if it has none
	url           url.URL      // where it goes

	again    func(cause error) // is told of each further attempt before it is made
	attempts int
	repeated bool // after a connection failure; a second one is final
}

// incoming is an answer, whose headers have come. Its body must be closed, and cut called after that.
type incoming struct {
	*http.Response
	cut      context.CancelCauseFunc // ends it
	patience time.Duration           // the longest that it may be silent
}

// send makes attempts until one brings response headers, and returns that answer. It gives up after the last retry of a
// timeout, at the second connection failure, at one that is not safe to repeat, and when the request's context ends. Its
// error is a *failure.
func (u *upstream) send(o *outgoing) (*incoming, error) {
	wait, retries := u.patience(o.Header)
	rewriteRequestHeader(o.Header, u.cfg.headers)
	o.url = upstreamURL(u.cfg.upstream, o.target, u.absolute)
	for {
		in, err := u.attempt(o, wait)
		timedOut := errors.Is(err, errHeaderTimeout)
		switch {
		case err == nil:
			return in, nil
		case timedOut && retries > 0:
			retries--
		case isSafeToRepeat(err) && !o.repeated:
			o.repeated = true
		default:
			return nil, err
		}
		select {
		case <-time.After(retryPause):
		case <-o.Context().Done():
			return nil, departure(o.Context())
		}
		if timedOut {
			u.pool.closeIdle() // they may be as dead as this attempt's, which is one of them by now
		}
		o.again(err)
	}
}

// isSafeToRepeat reports whether err proves that the upstream has not processed the request, which may cost money each
// time, and a second try may help: not after a dial that timed out, as that has been tried for long enough, nor with a bad
// certificate.
func isSafeToRepeat(err error) bool {
	dial, notDialled := errors.AsType[*dialError](err)
	_, unprocessed := errors.AsType[*unprocessedError](err)
	_, certificate := errors.AsType[*tls.CertificateVerificationError](err)
	return unprocessed || notDialled && !dial.Timeout() && !certificate
}

// patience returns how long an attempt waits for response headers, and the answer may fall silent after them, and how many
// times a timeout is retried: never if the client says that it waits longer than timeout_secs (Anthropic's SDKs do). A
// non-streaming answer sends no headers before it is finished, and repeating it would bill it again.
func (u *upstream) patience(h http.Header) (wait time.Duration, retries int) {
	if u.cfg.honorClientTimeout {
		stated, ok := parseSeconds(h.Get("X-Stainless-Timeout"))
		if !ok {
			stated, ok = parseSeconds(h.Get("X-Stainless-Read-Timeout")) // of the Python SDK when it streams
		}
		if !ok && h["X-Stainless-Lang"] != nil { // of the Go SDK, which says nothing when it streams
			stated = sdkPatience
		}
		if stated > u.cfg.timeout {
			return stated, 0
		}
	}
	return u.cfg.timeout, u.cfg.timeoutRetries
}

// parseSeconds reads a positive decimal number of seconds, maxPatience at most.
func parseSeconds(s string) (d time.Duration, ok bool) {
	if strings.Trim(s, "0123456789.") != "" {
		return 0, false // a sign, an exponent, a word
	}
	seconds, err := strconv.ParseFloat(s, 64)
	if seconds <= 0 || err != nil && !math.IsInf(seconds, 1) {
		return 0, false
	}
	return time.Duration(min(seconds, maxPatience.Seconds()) * float64(time.Second)), true
}

// attempt sends the request once and waits for response headers.
func (u *upstream) attempt(o *outgoing, wait time.Duration) (*incoming, error) {
	o.attempts++
	ctx, cancel := context.WithCancelCause(o.Context())
	deadline := startWatch(wait, func(time.Time) time.Duration { cancel(errHeaderTimeout); return 0 })
	resp, err := u.roundTrip(ctx, o)
	inTime := deadline.stop()
	switch {
	case err == nil && inTime && resp.StatusCode < 200:
		err = errInterim
	case err == nil && inTime:
		return &incoming{resp, cancel, wait}, nil
	}
	cause := context.Cause(ctx)
	cancel(nil)
	if resp != nil {
		resp.Body.Close()
	}
	switch {
	case o.Context().Err() != nil:
		return nil, departure(o.Context())
	case cause != nil:
		return nil, errTimeout(o.attempts, fmt.Errorf("%w: waited %v", cause, wait))
	}
	return nil, errConnection(err)
}

// roundTrip sends the request over a connection of the pool.
func (u *upstream) roundTrip(ctx context.Context, o *outgoing) (*http.Response, error) {
	conn, err := u.pool.reserve(ctx)
	if err != nil {
		return nil, err
	}
	req := (&http.Request{
		Method: o.Method,
		URL:    &o.url,
		Host:   u.cfg.upstream.Host,
		Header: o.Header,
		Proto:  "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
	}).WithContext(ctx)
	if o.body != nil && o.body.size > 0 {
		body := o.body.open()
		req.Body, req.ContentLength = body, o.body.size
		resp, err := conn.roundTrip(req)
		if err != nil {
			body.Close() // net/http does not always
		}
		return resp, err
	}
	return conn.roundTrip(req)
}
