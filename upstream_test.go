package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestHeaderTimeout: an upstream that sends no headers in time is asked again, 100 ms later; a moment before is in time, also
// in the last attempt.
func TestHeaderTimeout(t *testing.T) {
	const second = time.Second
	type row struct {
		settings string
		delays   []time.Duration // of each attempt's headers
		want     string
	}
	inBubbles(t, map[string]row{
		"never":                 {delays: []time.Duration{time.Hour, time.Hour, time.Hour}, want: "504 after 3m0.2s"},
		"no retries":            {settings: "timeout_retries = 0", delays: []time.Duration{time.Hour}, want: "504 after 1m0s"},
		"configured":            {settings: "timeout_secs = 1\ntimeout_retries = 1", delays: []time.Duration{2 * second, 2 * second}, want: "504 after 2.1s"},
		"first attempt in time": {delays: []time.Duration{time.Minute - 1}, want: "200 after 59.999999999s"},
		"last attempt in time":  {delays: []time.Duration{time.Hour, time.Hour, 59 * second}, want: "200 after 2m59.2s"},
	}, func(t *testing.T, row row) {
		var attempts atomic.Int32
		r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			equal(t, "the body", string(body), `{"max_tokens":1}`)
			select {
			case <-time.After(row.delays[attempts.Add(1)-1]):
			case <-r.Context().Done():
			}
		})
		got := r.post()
		got.expect(t, row.want)
		r.expectErrors(map[int][]errorType{504: {typeTimeout}}[got.status]...)
		equal(t, "it says so", strings.Contains(got.body, `"code":"timeout"`), got.status == 504)
		equal(t, "it says not to try again", got.header.Get("X-Should-Retry") == "false", got.status == 504)
		tried := len(row.delays)
		equal(t, "attempts", int(attempts.Load()), tried)
		equal(t, "retries counted", int(r.proxy.metrics.retries.Load()), tried-1)
		r.completed().expect(t, "attempts", float64(tried), "status", float64(got.status))
	})
}

// TestPatience: a client's patience above timeout_secs lengthens the one attempt that is then made, and the silence that is borne
// after it.
func TestPatience(t *testing.T) {
	const contract = 180200 * time.Millisecond // three attempts
	type row struct {
		settings string
		header   []string
		took     time.Duration
	}
	inBubbles(t, map[string]row{
		"nothing stated: litellm, Vercel's AI SDK, curl": {took: contract},
		"TypeScript SDK 1.12, Claude Code":               {header: []string{"X-Stainless-Lang", "js", "X-Stainless-Timeout", "600"}, took: 600 * time.Second},
		"Python SDK":                                     {header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "120.0", "X-Stainless-Read-Timeout", "120.0"}, took: 120 * time.Second},
		"Python SDK, streaming":                          {header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "NOT_GIVEN", "X-Stainless-Read-Timeout", "300"}, took: 300 * time.Second},
		"Go SDK 1.84, streaming":                         {header: []string{"X-Stainless-Lang", "go"}, took: 600 * time.Second},
		"LangChain":                                      {header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "NOT_GIVEN"}, took: 600 * time.Second},
		"the first number counts":                        {header: []string{"X-Stainless-Timeout", "30", "X-Stainless-Read-Timeout", "600", "X-Stainless-Lang", "js"}, took: contract},
		"no more than ours":                              {header: []string{"X-Stainless-Timeout", "60"}, took: contract},
		"not honoured":                                   {settings: "honor_client_timeout = false", header: []string{"X-Stainless-Timeout", "600"}, took: contract},
		"ours is longer":                                 {settings: "timeout_secs = 700\ntimeout_retries = 0", header: []string{"X-Stainless-Timeout", "600"}, took: 700 * time.Second},
	}, func(t *testing.T, row row) {
		r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/stream" {
				http.NewResponseController(w).Flush()
			}
			never(w, r)
		})
		r.post(row.header...).expect(t, fmt.Sprint("504 after ", row.took))
		silence, attempts := row.took, 1.0
		if row.took == contract {
			silence, attempts = time.Minute, 3
		}
		r.do("POST", "/stream", "x", row.header...).expect(t, fmt.Sprint("cut after ", silence))
		synctest.Wait()
		r.log.lines(t, "request completed")[0].expect(t, "attempts", attempts)
	})
}

// TestParseSeconds: what counts as a number.
func TestParseSeconds(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1": time.Second, "60.5": 60500 * time.Millisecond, "3601": time.Hour, "0061": 61 * time.Second, "0.5": time.Second / 2, "99999": time.Hour, strings.Repeat("9", 1000): time.Hour,
		"": 0, ".": 0, "0": 0, "0.0": 0, "-1": 0, "+600": 0, "1e3": 0, "0x258": 0, "600, 600": 0, "Inf": 0, "NaN": 0, "NOT_GIVEN": 0, "1.2.3": 0, "1_000": 0,
	} {
		d, ok := parseSeconds(s)
		holds(t, d == want && ok == (want > 0), "%.20q is %v, %t; want %v", s, d, ok, want)
	}
}

// failing has the first dials fail, as many as times.
func failing(err error, times int) func(int, net.Conn) (net.Conn, error) {
	return func(n int, conn net.Conn) (net.Conn, error) {
		if n <= times {
			conn.Close()
			return nil, err
		}
		return conn, nil
	}
}

// says is an upstream that reads the request, says text and hangs up.
func says(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		conn, _, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, text)
		conn.Close()
	}
}

// TestConnectionFailure: 502 of type connection, repeated once at most, and only if nothing was sent.
func TestConnectionFailure(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	type row struct {
		settings string
		dial     func(n int, conn net.Conn) (net.Conn, error)
		upstream http.HandlerFunc
		dials    int32
		want     string
	}
	inBubbles(t, map[string]row{
		"refused for ever":        {dial: failing(refused, 9), upstream: never, dials: 2, want: "502 after 100ms"},
		"refused once":            {dial: failing(refused, 1), upstream: echo, dials: 2, want: "200 after 100ms"},
		"name not found for ever": {dial: failing(&net.DNSError{Err: "no such host", IsNotFound: true}, 9), upstream: never, dials: 2, want: "502 after 100ms"},
		"dial timed out":          {dial: failing(context.DeadlineExceeded, 9), upstream: never, dials: 1, want: "502 after 0s"},
		"dial hangs for longer than timeout_secs": {settings: "timeout_secs = 2\ntimeout_retries = 1", dial: func(_ int, conn net.Conn) (net.Conn, error) {
			conn.Close()
			time.Sleep(5 * time.Second)
			return nil, context.DeadlineExceeded
		}, upstream: never, dials: 1, want: "504 after 4.1s"},
		"bad certificate":              {dial: failing(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, 9), upstream: never, dials: 1, want: "502 after 0s"},
		"lost after it was sent":       {upstream: says(""), dials: 1, want: "502 after 0s"},
		"an interim status at the end": {upstream: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), dials: 1, want: "502 after 0s"},
		"no HTTP":                      {upstream: says("SSH-2.0-secret\r\n"), dials: 1, want: "502 after 0s"},
		"headers beyond the limit": {upstream: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", maxUpstreamHeader))
		}, dials: 1, want: "502 after 0s"},
	}, func(t *testing.T, row row) {
		r := newRig(t, row.settings, row.upstream)
		r.wrap = row.dial
		got := r.post()
		got.expect(t, row.want)
		equal(t, "dials", r.dials.Load(), row.dials)
		r.expectErrors(map[int][]errorType{502: {typeConnection}, 504: {typeTimeout}}[got.status]...)
		equal(t, "it says so", strings.Contains(got.body, `"code":"connection"`), got.status == 502)
		holds(t, !strings.Contains(got.body, "secret"), "the body is %s", got.body)
	})
}

// TestStaleConnection: a pooled connection that turns out to be closed when the next request is written to it is
// replaced, once; what may have been read is not sent again.
func TestStaleConnection(t *testing.T) {
	for _, row := range []struct{ method, body string }{
		{method: "POST", body: "x"}, {method: "POST", body: strings.Repeat("x", 1<<20)}, {method: "POST"}, {method: "GET"},
	} {
		inBubble(t, fmt.Sprint(row.method, len(row.body)), func(t *testing.T) {
			var served atomic.Int32
			r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
				echo(w, r)
				served.Add(1)
			})
			stale := false
			r.wrap = func(n int, conn net.Conn) (net.Conn, error) {
				return &faultyConn{conn, func() error {
					if stale && n == 1 {
						return os.NewSyscallError("write", syscall.EPIPE)
					}
					return nil
				}}, nil
			}
			for _, want := range []string{"200 after 0s", "200 after 100ms"} {
				got := r.do(row.method, "/", row.body)
				got.expect(t, want)
				equal(t, "the same body", got.body == row.body, true)
				synctest.Wait()
				stale = true
			}
			equal(t, "served", served.Load(), 2)
			equal(t, "dials", r.dials.Load(), 2)
		})
	}
}

// TestReusedConnectionLost: a reused connection that breaks after the request was written to it may have had its
// request served: neither the proxy nor net/http sends it again, not even a GET or one with an idempotency key.
func TestReusedConnectionLost(t *testing.T) {
	for _, row := range []struct {
		method, body string
		header       []string
	}{
		{method: "POST", body: "x"}, {method: "POST", body: "x", header: []string{"Idempotency-Key", "k"}}, {method: "POST", header: []string{"X-Idempotency-Key", "k"}}, {method: "GET"}, {method: "HEAD"}, {method: "OPTIONS"}, {method: "DELETE"}, {method: "GET", body: "x"},
	} {
		inBubble(t, fmt.Sprintf("%s %q %v", row.method, row.body, row.header), func(t *testing.T) {
			served := make(chan struct{}, 10)
			r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				served <- struct{}{}
				if len(served) > 1 {
					panic(http.ErrAbortHandler)
				}
			})
			r.do(row.method, "/", row.body, row.header...)
			equal(t, "the status", r.do(row.method, "/", row.body, row.header...).status, 502)
			equal(t, "served", len(served), 2)
		})
	}
}
