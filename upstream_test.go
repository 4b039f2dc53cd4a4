package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestHeaderTimeout: an upstream that sends no headers is asked three times, 100 ms apart.
func TestHeaderTimeout(t *testing.T) {
	for _, row := range []struct {
		name     string
		settings string
		attempts []time.Duration // when they reach the upstream
		took     time.Duration
	}{
		{name: "defaults", attempts: []time.Duration{0, 60100 * time.Millisecond, 120200 * time.Millisecond}, took: 180200 * time.Millisecond},
		{name: "no retries", settings: "timeout_retries = 0", attempts: []time.Duration{0}, took: time.Minute},
		{name: "configured", settings: "timeout_secs = 1\ntimeout_retries = 1", attempts: []time.Duration{0, 1100 * time.Millisecond}, took: 2100 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				var mu sync.Mutex
				var attempts []time.Duration
				r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
					mu.Lock()
					attempts = append(attempts, time.Since(start))
					mu.Unlock()
					if body, _ := io.ReadAll(r.Body); string(body) != `{"max_tokens":1}` {
						t.Errorf("the body is %q", body)
					}
					<-r.Context().Done()
				})
				got := r.post()
				if got.status != 504 || got.took != row.took || got.header.Get("X-Should-Retry") != "false" || !strings.Contains(got.body, `"code":"timeout"`) {
					t.Errorf("%+v, want a 504 after %v", got, row.took)
				}
				synctest.Wait()
				if fmt.Sprint(attempts) != fmt.Sprint(row.attempts) {
					t.Errorf("attempts at %v, want %v", attempts, row.attempts)
				}
				if counts := r.proxy.errorCounts(); !maps.Equal(counts, map[errorType]uint64{typeTimeout: 1}) {
					t.Errorf("errors %v", counts)
				}
				if n := r.proxy.metrics.retries.Load(); n != uint64(len(row.attempts)-1) {
					t.Errorf("%d retries counted", n)
				}
				line := r.log.one(t, "request completed")
				if line["attempts"] != float64(len(row.attempts)) || line["status"] != 504.0 || line["ttfb_ms"] != 0.0 {
					t.Errorf("%v", line)
				}
			})
		})
	}
}

// TestAnswerInTime: headers that come a moment before the timeout are in time, also in the last attempt.
func TestAnswerInTime(t *testing.T) {
	for _, row := range []struct {
		name   string
		delays []time.Duration // of each attempt's headers
		took   time.Duration
	}{
		{name: "first attempt", delays: []time.Duration{time.Minute - 1}, took: time.Minute - 1},
		{name: "last attempt", delays: []time.Duration{time.Hour, time.Hour, 59 * time.Second}, took: 2*60100*time.Millisecond + 59*time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts := make(chan int, 1)
				attempts <- 0
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					n := <-attempts
					attempts <- n + 1
					select {
					case <-time.After(row.delays[n]):
					case <-r.Context().Done():
					}
				})
				if got := r.post(); got.status != 200 || got.took != row.took {
					t.Errorf("%+v, want a 200 after %v", got, row.took)
				}
			})
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
		{name: "Ruby SDK", header: []string{"X-Stainless-Lang", "ruby", "X-Stainless-Timeout", "600.0"}, took: 600 * time.Second},
		{name: "Go SDK 1.84, streaming", header: []string{"X-Stainless-Lang", "go"}, took: 600 * time.Second},
		{name: "LangChain", header: []string{"X-Stainless-Lang", "python", "X-Stainless-Timeout", "NOT_GIVEN"}, took: 600 * time.Second},
		{name: "no language, no number", header: []string{"X-Stainless-Timeout", "NOT_GIVEN"}, took: contract},
		{name: "a second more", header: []string{"X-Stainless-Timeout", "61"}, took: 61 * time.Second},
		{name: "a fraction more", header: []string{"X-Stainless-Timeout", "60.5"}, took: 60500 * time.Millisecond},
		{name: "the first number counts", header: []string{"X-Stainless-Timeout", "30", "X-Stainless-Read-Timeout", "600", "X-Stainless-Lang", "js"}, took: contract},
		{name: "the longest", header: []string{"X-Stainless-Timeout", "3600"}, took: time.Hour},
		{name: "beyond the longest", header: []string{"X-Stainless-Timeout", "3601"}, took: time.Hour},
		{name: "beyond all numbers", header: []string{"X-Stainless-Timeout", strings.Repeat("9", 400)}, took: time.Hour},
		{name: "no more than ours", header: []string{"X-Stainless-Timeout", "60"}, took: contract},
		{name: "not honoured", settings: "honor_client_timeout = false", header: []string{"X-Stainless-Timeout", "600"}, took: contract},
		{name: "ours is longer", settings: "timeout_secs = 700\ntimeout_retries = 0", header: []string{"X-Stainless-Timeout", "600"}, took: 700 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
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
		})
	}
}

// TestParseSeconds: what counts as a number.
func TestParseSeconds(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"1": time.Second, "0061": 61 * time.Second, "0.5": time.Second / 2, "99999": time.Hour, strings.Repeat("9", 1000): time.Hour,
		"": 0, ".": 0, "0": 0, "0.0": 0, "-1": 0, "+600": 0, "1e3": 0, "0x258": 0, "600, 600": 0, "Inf": 0, "NaN": 0, "NOT_GIVEN": 0, "1.2.3": 0, "1_000": 0,
	} {
		if d, ok := parseSeconds(s); d != want || ok != (want > 0) {
			t.Errorf("%.20q is %v, %t; want %v", s, d, ok, want)
		}
	}
}

// TestConnectionFailure: 502 of type connection, repeated once at most, and only if nothing was sent.
func TestConnectionFailure(t *testing.T) {
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	fail := func(err error, times int) func(int, net.Conn) (net.Conn, error) {
		return func(n int, conn net.Conn) (net.Conn, error) {
			if n <= times {
				conn.Close()
				return nil, err
			}
			return conn, nil
		}
	}
	lost := func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		panic(http.ErrAbortHandler)
	}
	for _, row := range []struct {
		name     string
		dial     func(n int, conn net.Conn) (net.Conn, error)
		upstream http.HandlerFunc
		method   string // POST if empty
		status   int
		dials    int32
		took     time.Duration
	}{
		{name: "refused for ever", dial: fail(refused, 9), status: 502, dials: 2, took: 100 * time.Millisecond},
		{name: "refused once", dial: fail(refused, 1), upstream: echo, status: 200, dials: 2, took: 100 * time.Millisecond},
		{name: "name not found for ever", dial: fail(&net.DNSError{Err: "no such host", IsNotFound: true}, 9), status: 502, dials: 2, took: 100 * time.Millisecond},
		{name: "dial timed out", dial: fail(context.DeadlineExceeded, 9), status: 502, dials: 1},
		{name: "bad certificate", dial: fail(&tls.CertificateVerificationError{Err: x509.UnknownAuthorityError{}}, 9), status: 502, dials: 1},
		{name: "lost after it was sent", upstream: lost, status: 502, dials: 1},
		{name: "lost after it was sent: GET", upstream: lost, method: "GET", status: 502, dials: 1},
		{name: "an interim status at the end", upstream: func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")
			conn.Close()
		}, status: 502, dials: 1},
		{name: "no HTTP", upstream: func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "SSH-2.0-secret\r\n")
			conn.Close()
		}, status: 502, dials: 1},
		{name: "headers beyond the limit", upstream: func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Long", strings.Repeat("x", maxUpstreamHeader))
		}, status: 502, dials: 1},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				upstream := row.upstream
				if upstream == nil {
					upstream = never
				}
				r := newRig(t, "", upstream)
				r.wrap = row.dial
				var got answer
				if row.method != "" {
					got = r.do(row.method, "/", "")
				} else {
					got = r.post()
				}
				if got.status != row.status || got.took != row.took || r.dials.Load() != row.dials {
					t.Errorf("%d after %v and %d dials; want %d after %v and %d dials", got.status, got.took, r.dials.Load(), row.status, row.took, row.dials)
				}
				want := map[errorType]uint64{}
				if row.status == 502 {
					want[typeConnection] = 1
					if !strings.Contains(got.body, `"code":"connection"`) || strings.Contains(got.body, "secret") {
						t.Errorf("the body is %s", got.body)
					}
				}
				if counts := r.proxy.errorCounts(); !maps.Equal(counts, want) {
					t.Errorf("errors %v", counts)
				}
			})
		})
	}
}

// TestStaleConnection: a pooled connection that turns out to be closed when the next request is written to it is
// replaced, once; what may have been read is not sent again.
func TestStaleConnection(t *testing.T) {
	for _, row := range []struct {
		name   string
		method string
		body   string
		status int
		served int // requests that reached the upstream
	}{
		{name: "POST", method: "POST", body: "x", status: 200, served: 2},
		{name: "long POST", method: "POST", body: strings.Repeat("x", 1<<20), status: 200, served: 2},
		{name: "POST without a body", method: "POST", status: 200, served: 2},
		{name: "DELETE", method: "DELETE", status: 200, served: 2},
		{name: "GET", method: "GET", status: 200, served: 2},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				served := make(chan struct{}, 10)
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					echo(w, r)
					served <- struct{}{}
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
				if got := r.do(row.method, "/", row.body); got.status != 200 {
					t.Fatalf("%+v", got)
				}
				synctest.Wait()
				stale = true
				got := r.do(row.method, "/", row.body)
				if got.status != row.status || got.body != row.body {
					t.Errorf("status %d and %d bytes, error %v; want %d and %d bytes", got.status, len(got.body), got.err, row.status, len(row.body))
				}
				if len(served) != row.served || r.dials.Load() != 2 {
					t.Errorf("%d requests served over %d connections, want %d over 2", len(served), r.dials.Load(), row.served)
				}
			})
		})
	}
}

// TestReusedConnectionLost: a reused connection that breaks after the request was written to it may have had its
// request served: neither the proxy nor net/http sends it again, not even a GET or one with an idempotency key.
func TestReusedConnectionLost(t *testing.T) {
	for _, row := range []struct{ method, body, header string }{
		{method: "POST", body: "x"}, {method: "POST", body: "x", header: "Idempotency-Key"}, {method: "POST", header: "X-Idempotency-Key"},
		{method: "GET"}, {method: "HEAD"}, {method: "OPTIONS"}, {method: "DELETE"}, {method: "GET", body: "x"},
	} {
		t.Run(fmt.Sprintf("%s %q %s", row.method, row.body, row.header), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				served := make(chan struct{}, 10)
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					served <- struct{}{}
					if len(served) > 1 {
						panic(http.ErrAbortHandler)
					}
				})
				var header []string
				if row.header != "" {
					header = []string{row.header, "k"}
				}
				r.do(row.method, "/", row.body, header...)
				got := r.do(row.method, "/", row.body, header...)
				if got.status != 502 || len(served) != 2 {
					t.Errorf("status %d, the upstream served %d requests; want 502 and 2", got.status, len(served))
				}
			})
		})
	}
}

// TestDialError: what counts as a dial that ran out of time.
func TestDialError(t *testing.T) {
	for _, row := range []struct {
		err     error
		timeout bool
		unsent  bool
	}{
		{err: context.DeadlineExceeded, timeout: true},
		{err: &net.DNSError{IsTimeout: true}, timeout: true},
		{err: fmt.Errorf("TLS handshake: %w", context.DeadlineExceeded), timeout: true},
		{err: &net.OpError{Err: syscall.ECONNREFUSED}, unsent: true},
		{err: io.EOF, unsent: true},
		{err: &tls.CertificateVerificationError{Err: io.EOF}},
	} {
		err := &dialError{row.err}
		if err.Timeout() != row.timeout || isUnsent(fmt.Errorf("wrapped: %w", err)) != row.unsent || !errors.Is(err, row.err) {
			t.Errorf("%v: timeout %t, unsent %t", row.err, err.Timeout(), isUnsent(err))
		}
	}
	if isUnsent(io.EOF) {
		t.Error("an error that is not of dialling proves nothing")
	}
}

// TestHangingDial: a dial that hangs is ended by timeout_secs, if that is shorter, as a timeout.
func TestHangingDial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "timeout_secs = 2\ntimeout_retries = 1\nconnect_timeout_secs = 5", echo)
		r.wrap = func(_ int, conn net.Conn) (net.Conn, error) {
			conn.Close()
			time.Sleep(5 * time.Second)
			return nil, context.DeadlineExceeded
		}
		if got := r.post(); got.status != 504 || got.took != 4100*time.Millisecond {
			t.Errorf("%+v, want a 504 after 4.1s", got)
		}
		time.Sleep(10 * time.Second) // net/http lets a dial go on that nobody waits for
	})
}

// TestUpstreamRequest: what one attempt sends, as the upstream reads it.
func TestUpstreamRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		here, there := net.Pipe()
		r := newRig(t, "", nil)
		r.wrap = func(_ int, conn net.Conn) (net.Conn, error) { conn.Close(); return here, nil }
		client := r.dialRaw()
		go client.send("POST /v1//messages?a;b HTTP/1.1\r\nHost: proxy\r\nConnection: x-hop\r\nX-Hop: 1\r\nContent-Length: 2\r\nauthorization: Bearer t\r\n\r\nhi")
		upstream := bufio.NewReader(there)
		var lines []string
		for {
			line, err := upstream.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			if line == "\r\n" {
				break
			}
			lines = append(lines, strings.TrimSpace(line))
		}
		want := "POST /v1//messages?a;b HTTP/1.1\nHost: 127.0.0.1:1\nContent-Length: 2\nAnthropic-Beta: oauth-2025-04-20\nAuthorization: Bearer t"
		if got := strings.Join(lines, "\n"); got != want {
			t.Errorf("sent\n%s\nwant\n%s", got, want)
		}
		body := make([]byte, 2)
		io.ReadFull(upstream, body)
		if string(body) != "hi" {
			t.Errorf("the body is %q", body)
		}
		there.Write([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
		if got := client.answer(); got.status != 204 {
			t.Errorf("%+v", got)
		}
	})
}

// TestNewUpstream: what the transport is told of the configuration.
func TestNewUpstream(t *testing.T) {
	cfg := testConfig(t, "proxy.timeout_secs = 3600\nproxy.connect_timeout_secs = 9", overrides{})
	u := newUpstream(cfg)
	if u.pool.timeout != 9*time.Second || u.pool.addr != "api.anthropic.com:" || !u.pool.transport.DisableCompression || u.pool.transport.HTTP2.MaxReceiveBufferPerStream != 256<<10 {
		t.Errorf("%+v, %+v", u.pool, u.pool.transport)
	}
	for seconds, want := range map[int]time.Duration{1: time.Second, 8: 2 * time.Second, 60: 15 * time.Second, 3600: 15 * time.Second} {
		u := newUpstream(testConfig(t, fmt.Sprintf("proxy.timeout_secs = %d", seconds), overrides{}))
		if got := u.pool.transport.HTTP2.PingTimeout; got != want {
			t.Errorf("timeout_secs %d: pings every %v, want %v", seconds, got, want)
		}
	}
	if via, err := u.pool.transport.Proxy(&http.Request{URL: &url.URL{Scheme: "http", Host: "127.0.0.1:1"}}); via != nil || err != nil {
		t.Errorf("loopback goes through %v, %v", via, err)
	}
}
