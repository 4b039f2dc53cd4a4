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
	for _, row := range []struct {
		name     string
		settings string
		delays   []time.Duration // of each attempt's headers
		status   int
		took     time.Duration
	}{
		{name: "never", delays: []time.Duration{time.Hour, time.Hour, time.Hour}, status: 504, took: 180200 * time.Millisecond},
		{name: "no retries", settings: "timeout_retries = 0", delays: []time.Duration{time.Hour}, status: 504, took: time.Minute},
		{name: "configured", settings: "timeout_secs = 1\ntimeout_retries = 1", delays: []time.Duration{2 * second, 2 * second}, status: 504, took: 2100 * time.Millisecond},
		{name: "first attempt in time", delays: []time.Duration{time.Minute - 1}, status: 200, took: time.Minute - 1},
		{name: "last attempt in time", delays: []time.Duration{time.Hour, time.Hour, 59 * second}, status: 200, took: 120200*time.Millisecond + 59*second},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			var attempts atomic.Int32
			r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
				if body, _ := io.ReadAll(r.Body); string(body) != `{"max_tokens":1}` {
					t.Errorf("the body is %q", body)
				}
				select {
				case <-time.After(row.delays[attempts.Add(1)-1]):
				case <-r.Context().Done():
				}
			})
			got := r.post()
			if got.status != row.status || got.took != row.took {
				t.Errorf("%+v, want a %d after %v", got, row.status, row.took)
			}
			if row.status == 200 {
				r.expectErrors()
			} else if r.expectErrors(typeTimeout); got.header.Get("X-Should-Retry") != "false" || !strings.Contains(got.body, `"code":"timeout"`) {
				t.Errorf("%+v", got)
			}
			tried := len(row.delays)
			if n, line := r.proxy.metrics.retries.Load(), r.completed(); int(attempts.Load()) != tried || n != uint64(tried-1) || line["attempts"] != float64(tried) || line["status"] != float64(row.status) {
				t.Errorf("%d attempts, %d retries counted; want %d; %v", attempts.Load(), n, tried, line)
			}
		})
	}
}

// TestPatience: a client's patience above timeout_secs lengthens the one attempt that is then made, and the silence that is borne
// after it.
func TestPatience(t *testing.T) {
	const contract = 180200 * time.Millisecond // three attempts
	for _, row := range []struct {
		name     string
		settings string
		header   []string
		took     time.Duration
	}{
		{name: "nothing stated: litellm, Vercel's AI SDK, curl", took: contract},
		{name: "TypeScript SDK 1.12, Claude Code", header: []string{"X-Stainless-Lang", "js", "X-Stainless-Timeout", "600"}, took: 600 * time.Second},
		{name: "Python SDK", header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "120.0", "X-Stainless-Read-Timeout", "120.0"}, took: 120 * time.Second},
		{name: "Python SDK, streaming", header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "NOT_GIVEN", "X-Stainless-Read-Timeout", "300"}, took: 300 * time.Second},
		{name: "Go SDK 1.84, streaming", header: []string{"X-Stainless-Lang", "go"}, took: 600 * time.Second},
		{name: "LangChain", header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "NOT_GIVEN"}, took: 600 * time.Second},
		{name: "the first number counts", header: []string{"X-Stainless-Timeout", "30", "X-Stainless-Read-Timeout", "600", "X-Stainless-Lang", "js"}, took: contract},
		{name: "no more than ours", header: []string{"X-Stainless-Timeout", "60"}, took: contract},
		{name: "not honoured", settings: "honor_client_timeout = false", header: []string{"X-Stainless-Timeout", "600"}, took: contract},
		{name: "ours is longer", settings: "timeout_secs = 700\ntimeout_retries = 0", header: []string{"X-Stainless-Timeout", "600"}, took: 700 * time.Second},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/stream" {
					http.NewResponseController(w).Flush()
				}
				never(w, r)
			})
			got := r.post(row.header...)
			if got.status != 504 || got.took != row.took {
				t.Errorf("%d after %v, want 504 after %v", got.status, got.took, row.took)
			}
			silence, attempts := row.took, 1.0
			if row.took == contract {
				silence, attempts = time.Minute, 3
			}
			if got := r.do("POST", "/stream", "x", row.header...); got.took != silence || got.err == nil {
				t.Errorf("a silent stream: %+v, want a cut after %v", got, silence)
			}
			synctest.Wait()
			if line := r.log.lines(t, "request completed")[0]; line["attempts"] != attempts {
				t.Errorf("%v attempts, want %v", line["attempts"], attempts)
			}
		})
	}
}

// TestParseSeconds: what counts as a number.
func TestParseSeconds(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1": time.Second, "60.5": 60500 * time.Millisecond, "3601": time.Hour, "0061": 61 * time.Second, "0.5": time.Second / 2, "99999": time.Hour, strings.Repeat("9", 1000): time.Hour,
		"": 0, ".": 0, "0": 0, "0.0": 0, "-1": 0, "+600": 0, "1e3": 0, "0x258": 0, "600, 600": 0, "Inf": 0, "NaN": 0, "NOT_GIVEN": 0, "1.2.3": 0, "1_000": 0,
	} {
		if d, ok := parseSeconds(s); d != want || ok != (want > 0) {
			t.Errorf("%.20q is %v, %t; want %v", s, d, ok, want)
		}
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

// TestConnectionFailure: 502 of type connection, repeated once at most, and only if nothing was sent.
func TestConnectionFailure(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	says := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, text)
			conn.Close()
		}
	}
	for _, row := range []struct {
		name     string
		settings string
		dial     func(n int, conn net.Conn) (net.Conn, error)
		upstream http.HandlerFunc
		status   int
		dials    int32
		took     time.Duration
	}{
		{name: "refused for ever", dial: failing(refused, 9), upstream: never, status: 502, dials: 2, took: 100 * time.Millisecond},
		{name: "refused once", dial: failing(refused, 1), upstream: echo, status: 200, dials: 2, took: 100 * time.Millisecond},
		{name: "name not found for ever", dial: failing(&net.DNSError{Err: "no such host", IsNotFound: true}, 9), upstream: never, status: 502, dials: 2, took: 100 * time.Millisecond},
		{name: "dial timed out", dial: failing(context.DeadlineExceeded, 9), upstream: never, status: 502, dials: 1},
		{name: "dial hangs for longer than timeout_secs", settings: "timeout_secs = 2\ntimeout_retries = 1", dial: func(_ int, conn net.Conn) (net.Conn, error) {
			conn.Close()
			time.Sleep(5 * time.Second)
			return nil, context.DeadlineExceeded
		}, upstream: never, status: 504, dials: 1, took: 4100 * time.Millisecond},
		{name: "bad certificate", dial: failing(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, 9), upstream: never, status: 502, dials: 1},
		{name: "lost after it was sent", upstream: says(""), status: 502, dials: 1},
		{name: "an interim status at the end", upstream: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), status: 502, dials: 1},
		{name: "no HTTP", upstream: says("SSH-2.0-secret\r\n"), status: 502, dials: 1},
		{name: "headers beyond the limit", upstream: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", maxUpstreamHeader))
		}, status: 502, dials: 1},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			r := newRig(t, row.settings, row.upstream)
			r.wrap = row.dial
			got := r.post()
			if got.status != row.status || got.took != row.took || r.dials.Load() != row.dials {
				t.Errorf("%d after %v and %d dials; want %d after %v and %d dials", got.status, got.took, r.dials.Load(), row.status, row.took, row.dials)
			}
			r.expectErrors(map[int][]errorType{502: {typeConnection}, 504: {typeTimeout}}[row.status]...)
			if row.status == 502 && !strings.Contains(got.body, `"code":"connection"`) || strings.Contains(got.body, "secret") {
				t.Errorf("the body is %s", got.body)
			}
		})
	}
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
			for range 2 {
				if got := r.do(row.method, "/", row.body); got.status != 200 || got.body != row.body {
					t.Errorf("status %d and %d bytes, error %v; want 200 and %d bytes", got.status, len(got.body), got.err, len(row.body))
				}
				synctest.Wait()
				stale = true
			}
			if served.Load() != 2 || r.dials.Load() != 2 {
				t.Errorf("%d requests served over %d connections, want 2 over 2", served.Load(), r.dials.Load())
			}
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
			got := r.do(row.method, "/", row.body, row.header...)
			if got.status != 502 || len(served) != 2 {
				t.Errorf("status %d, the upstream served %d requests; want 502 and 2", got.status, len(served))
			}
		})
	}
}
