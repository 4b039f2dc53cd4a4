package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestStreamAtItsPace: a byte every 30 s for five minutes arrives complete, each byte at its time.
func TestStreamAtItsPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			control := http.NewResponseController(w)
			control.Flush()
			for i := range 10 {
				time.Sleep(30 * time.Second)
				fmt.Fprint(w, i)
				control.Flush()
			}
		})
		req, _ := http.NewRequest("POST", "http://proxy/v1/messages", strings.NewReader("x"))
		start := time.Now()
		resp, err := r.client.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(start); waited != 0 {
			t.Errorf("the headers took %v", waited)
		}
		for i := range 10 {
			var b [1]byte
			if _, err := io.ReadFull(resp.Body, b[:]); err != nil {
				t.Fatalf("byte %d: %v", i, err)
			}
			if at, want := time.Since(start), time.Duration(i+1)*30*time.Second; at != want {
				t.Errorf("byte %d came after %v, want %v", i, at, want)
			}
		}
		if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
			t.Errorf("after the last byte: %q, %v", rest, err)
		}
		synctest.Wait()
		line := r.log.one(t, "request completed")
		if line["latency_ms"] != 300_000.0 || line["ttfb_ms"] != 0.0 || line["bytes_out"] != 10.0 || line["status"] != 200.0 || line["error"] != nil {
			t.Errorf("%v", line)
		}
	})
}

// TestSilentStream: a stream is cut exactly timeout_secs after its last byte, and cannot be taken
// for a complete one.
func TestSilentStream(t *testing.T) {
	for _, row := range []struct {
		name  string
		bytes []time.Duration // pauses before each byte
		chunk bool            // of undeclared length
		want  time.Duration   // the cut
	}{
		{name: "no byte at all", chunk: true, want: 60 * time.Second},
		{name: "one byte", bytes: []time.Duration{0}, chunk: true, want: 60 * time.Second},
		{name: "several bytes", bytes: []time.Duration{time.Second, 59 * time.Second, 30 * time.Second}, chunk: true, want: 150 * time.Second},
		{name: "nearly silent before", bytes: []time.Duration{60*time.Second - 1, 60*time.Second - 1}, chunk: true, want: 180*time.Second - 2},
		{name: "declared length", bytes: []time.Duration{10 * time.Second}, want: 70 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					if !row.chunk {
						w.Header().Set("Content-Length", "100")
					}
					control := http.NewResponseController(w)
					control.Flush()
					for _, pause := range row.bytes {
						time.Sleep(pause)
						w.Write([]byte("x"))
						control.Flush()
					}
					<-r.Context().Done()
				})
				got := r.do("GET", "/", "")
				if got.status != 200 || got.took != row.want || len(got.body) != len(row.bytes) || !errors.Is(got.err, io.ErrUnexpectedEOF) {
					t.Errorf("%+v, want a cut after %v", got, row.want)
				}
				synctest.Wait()
				if counts := r.proxy.errorCounts(); !maps.Equal(counts, map[errorType]uint64{typeResponseRead: 1}) {
					t.Errorf("errors %v", counts)
				}
				if line := r.log.one(t, "request completed"); line["error"] != "response_read: the upstream fell silent for 1m0s" || line["status"] != 200.0 {
					t.Errorf("%v", line)
				}
			})
		})
	}
}

// TestSlowReader: the time in which the client does not read is no silence of the upstream, but a client that
// reads nothing for timeout_secs is given up.
func TestSlowReader(t *testing.T) {
	for _, row := range []struct {
		name     string
		pause    time.Duration
		complete bool
	}{
		{name: "pauses", pause: 59 * time.Second, complete: true},
		{name: "stops", pause: 68 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const size = 64 << 10
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					if r.URL.Path != "/small" {
						w.Write(make([]byte, size))
					}
				})
				req, _ := http.NewRequest("GET", "http://proxy/", nil)
				r.client.ReadBufferSize = 1 // nothing is read ahead
				r.do("GET", "/small", "")   // after an answer net/http takes the connection's deadline away
				resp, err := r.client.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				n, buf := 0, make([]byte, 16<<10)
				for err == nil {
					time.Sleep(row.pause)
					var m int
					m, err = io.ReadFull(resp.Body, buf)
					n += m
				}
				if complete := n == size && err == io.EOF; complete != row.complete {
					t.Errorf("%d of %d bytes, then %v", n, size, err)
				}
				synctest.Wait()
				line := r.log.lines(t, "request completed")[1]
				if got := line["status"]; (got == 200.0) != row.complete || !row.complete && got != 499.0 {
					t.Errorf("status %v", got)
				}
				if took := line["latency_ms"]; !row.complete && took != 67_500.0 {
					t.Errorf("given up after %v ms, want nine eighths of timeout_secs", took)
				}
				if counts := r.proxy.errorCounts(); len(counts) > 0 {
					t.Errorf("errors %v", counts)
				}
			})
		})
	}
}

// TestBrokenStream: an answer whose upstream breaks off is broken for the client too.
func TestBrokenStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "data: 1\n\n")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		})
		got := r.do("GET", "/", "")
		if got.status != 200 || got.body != "data: 1\n\n" || !errors.Is(got.err, io.ErrUnexpectedEOF) {
			t.Errorf("%+v", got)
		}
		synctest.Wait()
		if counts := r.proxy.errorCounts(); counts[typeResponseRead] != 1 {
			t.Errorf("errors %v", counts)
		}
	})
}

// TestClientLeaves: at whatever moment, its request is cancelled upstream at once, counted as 499 and as no error.
func TestClientLeaves(t *testing.T) {
	for _, row := range []struct {
		name     string
		upstream http.HandlerFunc
		began    bool // of the answer
	}{
		{name: "before the headers", upstream: never},
		{name: "in the middle of the answer", began: true, upstream: func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var cancelled time.Time
				r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
					row.upstream(w, r)
					cancelled = time.Now()
				})
				ctx, leave := context.WithTimeout(t.Context(), 7*time.Second)
				defer leave()
				start := time.Now()
				req, _ := http.NewRequestWithContext(ctx, "POST", "http://proxy/", strings.NewReader("x"))
				resp, err := r.client.RoundTrip(req)
				if row.began != (err == nil) {
					t.Fatal(err)
				}
				if resp != nil {
					io.Copy(io.Discard, resp.Body)
				}
				synctest.Wait()
				if after := cancelled.Sub(start); after != 7*time.Second {
					t.Errorf("cancelled upstream after %v, want 7s", after)
				}
				if line := r.log.one(t, "request completed"); line["status"] != 499.0 || line["latency_ms"] != 7000.0 || line["error"] != "client_gone: the client left" {
					t.Errorf("%v", line)
				}
				if counts := r.proxy.errorCounts(); len(counts) > 0 {
					t.Errorf("errors %v", counts)
				}
				if taken, _ := r.proxy.places.load(); taken != 0 {
					t.Errorf("%d places are still taken", taken)
				}
			})
		})
	}
}

// TestQueue: requests beyond max_connections wait in arrival order, and one that leaves frees its place in line.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var served []string // one at a time
		r := newRig(t, "max_connections = 1", func(w http.ResponseWriter, r *http.Request) {
			served = append(served, r.URL.Path)
			io.Copy(io.Discard, r.Body)
			time.Sleep(10 * time.Second)
		})
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				ctx, leave := context.WithCancel(t.Context())
				defer leave()
				if i == 2 {
					time.AfterFunc(5*time.Second, leave)
				}
				req, _ := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("http://proxy/%d", i), nil)
				start := time.Now()
				resp, err := r.client.RoundTrip(req)
				took := time.Since(start)
				want := []time.Duration{10 * time.Second, 20 * time.Second, 5 * time.Second, 30 * time.Second}[i]
				if took != want || (err != nil) != (i == 2) {
					t.Errorf("request %d: %v after %v, want it after %v", i, err, took, want)
				}
				if err == nil {
					resp.Body.Close()
				}
			})
			synctest.Wait() // one after the other
		}
		wg.Wait()
		synctest.Wait()
		if want := []string{"/0", "/1", "/3"}; !slices.Equal(served, want) {
			t.Errorf("served %v, want %v", served, want)
		}
	})
}

// panicky panics when it is read.
type panicky struct{ io.Closer }

func (panicky) Read([]byte) (int, error) { panic("boom") }

// TestPanic: a bug is a 500 of type internal, or a broken answer if that has begun; the proxy goes on.
func TestPanic(t *testing.T) {
	for _, row := range []struct {
		name  string
		spoil func(w http.ResponseWriter, r *http.Request) http.ResponseWriter
		began bool
	}{
		{name: "before the headers", spoil: func(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
			r.Body = panicky{r.Body}
			return w
		}},
		{name: "in the middle of the answer", began: true, spoil: func(w http.ResponseWriter, _ *http.Request) http.ResponseWriter {
			return panickyWriter{w}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", echo)
				r.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					if req.URL.Path == "/panic" {
						w = row.spoil(w, req)
					}
					r.proxy.ServeHTTP(w, req)
				})
				got := r.do("POST", "/panic", "x")
				if row.began {
					if got.status != 200 || !errors.Is(got.err, io.ErrUnexpectedEOF) {
						t.Errorf("%+v, want a broken answer", got)
					}
				} else if got.status != 500 || !strings.Contains(got.body, `"code":"internal"`) || strings.Contains(got.body, "boom") {
					t.Errorf("%+v, want a 500", got)
				}
				synctest.Wait()
				if counts := r.proxy.errorCounts(); !maps.Equal(counts, map[errorType]uint64{typeInternal: 1}) {
					t.Errorf("errors %v", counts)
				}
				if line := r.log.one(t, "request completed"); line["error"] != "internal: panic: boom" {
					t.Errorf("%v", line)
				}
				if stack := fmt.Sprint(r.log.one(t, "panic in a request: this is a bug, please report it")["stack"]); !strings.Contains(stack, "proxy_test.go") {
					t.Errorf("the log's stack is %s", stack)
				}
				if got := r.do("POST", "/", "x"); got.status != 200 || got.body != "x" {
					t.Errorf("the next request: %+v", got)
				}
				for name, g := range map[string]*gate{"places": r.proxy.places, "body bytes": r.proxy.bodies.budget} {
					if taken, _ := g.load(); taken != 0 {
						t.Errorf("%d %s are still taken", taken, name)
					}
				}
				if n := r.proxy.active.Load(); n != 0 {
					t.Errorf("%d requests are active", n)
				}
			})
		})
	}
}

// panickyWriter panics at the first byte of an answer.
type panickyWriter struct{ http.ResponseWriter }

func (panickyWriter) Write([]byte) (int, error)     { panic("boom") }
func (w panickyWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// TestShutDown holds the sequence of the runbook to the clock. Requests take as long as their path says.
func TestShutDown(t *testing.T) {
	const (
		signalled = "received SIGTERM, shutting down"
		drained   = "all in-flight requests drained"
		exceeded  = "drain timeout exceeded, forcing shutdown"
		complete  = "shutdown complete"
	)
	type moment struct {
		after   time.Duration
		message string
	}
	for _, row := range []struct {
		name     string
		settings string
		requests []string // durations
		began    bool     // their answers begin at once
		again    time.Duration
		want     []moment // after the signal; the last one may be up to lastBytes later
		answers  []string // status after the signal, in the order of requests
	}{
		{name: "idle", want: []moment{{0, signalled}, {0, drained}, {0, complete}}},
		{name: "drained", requests: []string{"3s", "4s"}, want: []moment{{0, signalled}, {4 * time.Second, drained}, {4 * time.Second, complete}},
			answers: []string{"200 after 3s", "200 after 4s"}},
		{name: "exceeded", requests: []string{"3s", "1h", "1h"}, want: []moment{{0, signalled}, {5 * time.Second, exceeded}, {5 * time.Second, complete}},
			answers: []string{"200 after 3s", "503 after 5s", "503 after 5s"}},
		{name: "exceeded while streaming", began: true, requests: []string{"1h"}, want: []moment{{0, signalled}, {5 * time.Second, exceeded}, {5 * time.Second, complete}},
			answers: []string{"cut after 5s"}},
		{name: "configured", settings: "drain_timeout_secs = 3600\ntimeout_secs = 3600", requests: []string{"59m"}, began: true,
			want: []moment{{0, signalled}, {59 * time.Minute, drained}, {59 * time.Minute, complete}}, answers: []string{"200 after 59m0s"}},
		{name: "no drain at all", settings: "drain_timeout_secs = 0", requests: []string{"1s"}, want: []moment{{0, signalled}, {0, exceeded}, {0, complete}},
			answers: []string{"503 after 0s"}},
		{name: "queued requests are sent away at once", settings: "max_connections = 1", requests: []string{"2s", "1s", "1s"},
			want: []moment{{0, signalled}, {2 * time.Second, drained}, {2 * time.Second, complete}}, answers: []string{"200 after 2s", "503 after 0s", "503 after 0s"}},
		{name: "second signal", requests: []string{"1h"}, again: 2 * time.Second,
			want: []moment{{0, signalled}, {2 * time.Second, "received SIGINT again, exiting at once"}}, answers: []string{"503 after 2s"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					if row.began {
						http.NewResponseController(w).Flush()
					}
					d, _ := time.ParseDuration(r.URL.Path[1:])
					select {
					case <-time.After(d):
					case <-r.Context().Done():
					}
				})
				answers := make([]answer, len(row.requests))
				var wg sync.WaitGroup
				for i, path := range row.requests {
					wg.Go(func() { answers[i] = r.do("POST", "/"+path, "x") })
					synctest.Wait()
				}
				start := time.Now()
				r.signals <- syscall.SIGTERM
				if row.again > 0 {
					time.Sleep(row.again)
					r.signals <- syscall.SIGINT
				}
				<-r.done
				end := time.Since(start)
				wg.Wait()
				if r.err != nil || exitCode(r.err) != 0 {
					t.Errorf("it ended with %v", r.err)
				}
				if last := row.want[len(row.want)-1].after; end < last || end > last+2*lastBytes {
					t.Errorf("it ended after %v, want %v", end, last)
				}
				var messages []string
				for i, line := range r.log.lines(t, signalled, drained, exceeded, complete, "received SIGINT again, exiting at once") {
					messages = append(messages, line["message"].(string))
					if i < len(row.want) {
						at, slack := line.time(t).Sub(start), time.Duration(0)
						if row.want[i].message == complete {
							slack = 2 * lastBytes
						}
						if at < row.want[i].after || at > row.want[i].after+slack {
							t.Errorf("%v after %v, want %v", line["message"], at, row.want[i].after)
						}
					}
				}
				var want []string
				for _, m := range row.want {
					want = append(want, m.message)
				}
				if !slices.Equal(messages, want) {
					t.Errorf("logged %q\nwant   %q", messages, want)
				}
				for i, a := range answers {
					got := fmt.Sprintf("%d after %v", a.status, a.took)
					if a.err != nil {
						got = fmt.Sprintf("cut after %v", a.took)
					}
					if got != row.answers[i] {
						t.Errorf("request %d got %s (%v), want %s", i, got, a.err, row.answers[i])
					}
					if a.status == 503 && (!a.last || a.header.Get("X-Should-Retry") != "true") {
						t.Errorf("request %d got the header %v", i, a.header)
					}
				}
				if len(r.log.lines(t, exceeded)) > 0 {
					left := 0
					for _, got := range row.answers {
						if !strings.HasPrefix(got, "200") {
							left++
						}
					}
					if line := r.log.one(t, exceeded); line["remaining"] != float64(left) || line["drain_timeout_secs"] != row.want[1].after.Seconds() {
						t.Errorf("%v", line)
					}
				}
				if row.again == 0 && len(r.log.lines(t, "request completed")) != len(row.requests) {
					t.Errorf("%d of %d requests have their line in the log", len(r.log.lines(t, "request completed")), len(row.requests))
				}
			})
		})
	}
}

// TestShutDownRefusesNewRequests: on connections that are open already, while others drain.
func TestShutDownRefusesNewRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", never)
		idle := r.dialRaw()
		go r.post()
		synctest.Wait()
		// Half of a request: a connection that is idle would be closed.
		idle.send("POST / HTTP/1.1\r\n")
		r.signals <- syscall.SIGTERM
		synctest.Wait()
		go idle.send("Host: x\r\nContent-Length: 5\r\n\r\n") // and the body stays away
		if got := idle.answer(); got.status != 503 || got.took != 0 || !got.last || !strings.Contains(got.body, `"code":"shutting_down"`) {
			t.Errorf("%+v, want a 503 at once", got)
		}
		if _, err := r.front.dial(t.Context(), "", ""); err == nil {
			t.Error("a new connection was accepted")
		}
	})
}

// TestRequestCompleted: one line per request with exactly these keys, in this order, and neither queries
// nor headers nor bodies in it.
func TestRequestCompleted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Request-Id", "req_upstream")
			time.Sleep(1500 * time.Millisecond)
			http.NewResponseController(w).Flush()
			time.Sleep(time.Second)
			io.WriteString(w, "secret-answer")
		})
		got := r.do("POST", "/v1//messages%2F?key=secret-query", "secret-body", "Authorization", "Bearer secret-token")
		synctest.Wait()
		line := r.log.one(t, "request completed")
		want := logLine{"timestamp": line["timestamp"], "level": "INFO", "message": "request completed", "request_id": got.header.Get("X-Proxy-Request-Id"), "method": "POST",
			"path": "/v1//messages%2F", "status": 200.0, "latency_ms": 2500.0, "ttfb_ms": 1500.0, "attempts": 1.0, "bytes_in": 11.0, "bytes_out": 13.0,
			"upstream_request_id": "req_upstream", "tailnet_node": "", "tailnet_user": ""}
		if !maps.Equal(line, want) {
			t.Errorf("got  %v\nwant %v", line, want)
		}
		text := r.log.buf.String()
		if strings.Contains(text, "secret") {
			t.Errorf("the log has a secret in it:\n%s", text)
		}
		order := regexp.MustCompile(`"(\w+)":`).FindAllStringSubmatch(text[strings.Index(text, `"request completed"`):], -1)
		var keys []string
		for _, m := range order {
			keys = append(keys, m[1])
		}
		if got := strings.Join(keys, " "); got != "request_id method path status latency_ms ttfb_ms attempts bytes_in bytes_out upstream_request_id tailnet_node tailnet_user" {
			t.Errorf("the keys are %s", got)
		}
	})
}

// TestLogLevelHidesRequests: at warn there is no line per request.
func TestLogLevelHidesRequests(t *testing.T) {
	for level, want := range map[slog.Level]int{slog.LevelInfo: 1, slog.LevelWarn: 0} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, "", echo)
			r.proxy.log, _ = newLogger(&r.log, level)
			r.post()
			synctest.Wait()
			if lines := r.log.lines(t, "request completed"); len(lines) != want {
				t.Errorf("at %v: %d lines, want %d", level, len(lines), want)
			}
		})
	}
}

// TestLogWaitsForIdentity: the log line comes with the caller's name when tailscaled says it; the answer does not wait.
func TestLogWaitsForIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string), whois: func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(time.Second)
			io.WriteString(w, whoisAlice)
		}}
		tn, _ := followed(t, d)
		r := newRig(t, "", echo)
		r.proxy.tailnet = tn // as without -local
		for i, wait := range []time.Duration{time.Second, 0} {
			if got := r.post(); got.status != 200 || got.took != 0 {
				t.Errorf("%+v", got)
			}
			synctest.Wait()
			if lines := r.log.lines(t, "request completed"); len(lines) != i && wait > 0 {
				t.Errorf("there is a line already: %v", lines)
			}
			time.Sleep(wait)
			synctest.Wait()
			lines := r.log.lines(t, "request completed")
			if len(lines) != i+1 || lines[i]["tailnet_node"] != "laptop.x.ts.net" || lines[i]["tailnet_user"] != "alice@example.com" {
				t.Errorf("%v", lines)
			}
		}
	})
}

// roundTripper answers without a network.
type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestTailnetDecides: before the first connection 503, after a loss requests are still served, and strangers get
// 403 if callers must be known.
func TestTailnetDecides(t *testing.T) {
	up, down := &tailnetState{hostname: "node-1"}, &tailnetState{problem: &problem{tailnetNotRunning, "x"}}
	for _, row := range []struct {
		name     string
		states   []*tailnetState
		required bool
		whois    int // tailscaled's status
		status   int
		header   string
	}{
		{name: "nothing seen", status: 503, header: "Retry-After: 2"},
		{name: "not connected yet", states: []*tailnetState{down}, status: 503, header: "Retry-After: 2"},
		{name: "connected", states: []*tailnetState{up}, status: 200},
		{name: "lost", states: []*tailnetState{up, down}, status: 200},
		{name: "connected, stranger", states: []*tailnetState{up}, required: true, whois: 404, status: 403},
		{name: "connected, tailscaled does not say", states: []*tailnetState{up}, required: true, whois: 500, status: 503, header: "Retry-After: 1"},
		{name: "not connected yet, stranger", states: []*tailnetState{down}, required: true, status: 503, header: "Retry-After: 2"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", echo)
				tn, _ := newTestTailnet()
				tn.client.Transport = roundTripper(func(*http.Request) (*http.Response, error) {
					return &http.Response{StatusCode: row.whois, Body: http.NoBody}, nil
				})
				for _, state := range row.states {
					tn.publish(state)
				}
				r.proxy.tailnet = tn
				r.proxy.cfg.requireTailnet = row.required
				got := r.post()
				if got.status != row.status || row.header != "" && row.header != fmt.Sprint("Retry-After: ", got.header.Get("Retry-After")) {
					t.Errorf("%+v, want %d %s", got, row.status, row.header)
				}
				if counts := r.proxy.errorCounts(); len(counts) > 0 {
					t.Errorf("errors %v", counts)
				}
			})
		})
	}
}

func TestNewRequestID(t *testing.T) {
	uuid := regexp.MustCompile(`^req_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)
	seen := map[string]bool{}
	for range 1000 {
		id := newRequestID()
		if !uuid.MatchString(id) || seen[id] {
			t.Fatalf("%s is no new version 4 UUID", id)
		}
		seen[id] = true
	}
}

// TestErrorBodyNamesRequest: an error's id is the same in body, headers and log.
func TestErrorBodyNamesRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "timeout_retries = 0", never)
		got := r.post()
		var body struct {
			RequestID string `json:"request_id"`
			Error     struct {
				RequestID string `json:"request_id"`
			}
		}
		if err := json.Unmarshal([]byte(got.body), &body); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		id := got.header.Get("X-Proxy-Request-Id")
		for where, other := range map[string]any{"body": body.RequestID, "error": body.Error.RequestID, "request-id": got.header.Get("Request-Id"),
			"log": r.log.one(t, "request completed")["request_id"]} {
			if other != id || id == "" {
				t.Errorf("%s has %v, x-proxy-request-id %s", where, other, id)
			}
		}
	})
}
