package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// poolRig is a pool in a bubble of synctest, in front of a real http.Server.
type poolRig struct {
	*pool
	t      *testing.T
	opened atomic.Int32 // connections that were asked for
	// dialled, if not nil, is called before the n-th connection is made.
	dialled func(n int) error
}

func newPoolRig(t *testing.T, http2 bool, upstream http.HandlerFunc) *poolRig {
	var protocols http.Protocols
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)
	back := newPipeListener()
	server := &http.Server{Handler: upstream, Protocols: &protocols}
	go server.Serve(back)
	r := &poolRig{t: t, pool: newUpstream(testConfig(t, "", overrides{upstream: "http://127.0.0.1:1"})).pool}
	r.transport.Protocols = &protocols
	r.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		n := int(r.opened.Add(1))
		if r.dialled != nil {
			if err := r.dialled(n); err != nil {
				return nil, err
			}
		}
		conn, err := back.dial(ctx, network, addr)
		return newUpstreamConn(ctx, conn, time.Minute), err
	}
	t.Cleanup(func() {
		r.closeIdle()
		server.Close()
		time.Sleep(time.Minute) // dials that nobody waits for, and what net/http lingers on
	})
	return r
}

// send makes one request and reads its whole answer.
func (r *poolRig) send(ctx context.Context, path string, body io.Reader) (string, error) {
	conn, err := r.reserve(ctx)
	if err != nil {
		return "", err
	}
	req, _ := http.NewRequestWithContext(ctx, "POST", "http://127.0.0.1:1"+path, body)
	resp, err := conn.roundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	return string(got), err
}

// TestPoolColdStart: while it is not known what the upstream speaks, one connection is opened; then as many as are needed, for all who
// wait at once.
func TestPoolColdStart(t *testing.T) {
	for _, row := range []struct {
		name  string
		http2 bool
		dials int32
		took  time.Duration // a handshake takes 300 ms, an answer a second
	}{
		{name: "HTTP/2", http2: true, dials: 3, took: 1600 * time.Millisecond},
		{name: "HTTP/1.1", dials: 300, took: 1600 * time.Millisecond},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newPoolRig(t, row.http2, func(http.ResponseWriter, *http.Request) { time.Sleep(time.Second) })
				r.dialled = func(int) error { time.Sleep(300 * time.Millisecond); return nil }
				start := time.Now()
				var wg sync.WaitGroup
				for range 300 {
					wg.Go(func() {
						if _, err := r.send(t.Context(), "/", nil); err != nil {
							t.Error(err)
						}
					})
				}
				wg.Wait()
				if took := time.Since(start); took != row.took || r.opened.Load() != row.dials {
					t.Errorf("%d dials, all answered after %v; want %d and %v", r.opened.Load(), took, row.dials, row.took)
				}
			})
		})
	}
}

// TestPoolReuse: one connection serves requests that come one after the other, and is closed when it was unused for five minutes.
func TestPoolReuse(t *testing.T) {
	for name, http2 := range map[string]bool{"HTTP/2": true, "HTTP/1.1": false} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newPoolRig(t, http2, echo)
				for i, row := range []struct {
					pause time.Duration
					dials int32
				}{{0, 1}, {0, 1}, {upstreamIdle - time.Second, 1}, {upstreamIdle - time.Second, 1}, {upstreamIdle + time.Second, 2}} {
					time.Sleep(row.pause)
					synctest.Wait()
					if got, err := r.send(t.Context(), "/", strings.NewReader("x")); got != "x" || err != nil {
						t.Fatalf("request %d: %q, %v", i, got, err)
					}
					if r.opened.Load() != row.dials {
						t.Errorf("request %d: %d dials, want %d", i, r.opened.Load(), row.dials)
					}
				}
			})
		})
	}
}

// TestPoolDialFails: the failure goes to those who waited when the dial began. Who comes later gets a dial of their own.
func TestPoolDialFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPoolRig(t, true, echo)
		r.dialled = func(n int) error {
			time.Sleep(time.Second)
			if n == 1 {
				return syscall.ECONNREFUSED
			}
			return nil
		}
		var wg sync.WaitGroup
		start := time.Now()
		for i := range 20 {
			wg.Go(func() {
				if i > 0 {
					time.Sleep(time.Millisecond)
				}
				_, err := r.send(t.Context(), "/", nil)
				_, dial := errors.AsType[*dialError](err)
				switch took := time.Since(start); {
				case i == 0 && (!dial || !errors.Is(err, syscall.ECONNREFUSED) || took != time.Second):
					t.Errorf("at first: %v after %v", err, took)
				case i > 0 && (err != nil || took != 2*time.Second):
					t.Errorf("later: %v after %v", err, took)
				}
			})
		}
		wg.Wait()
		if r.opened.Load() != 2 {
			t.Errorf("%d dials, want 2", r.opened.Load())
		}
	})
}

// TestPoolWaiterLeaves: the dial that it has begun goes on for the others, and a place that comes too late is not lost.
func TestPoolWaiterLeaves(t *testing.T) {
	for name, leaves := range map[string]time.Duration{"before": 500 * time.Millisecond, "at the same moment": time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newPoolRig(t, false, echo)
				r.dialled = func(int) error { time.Sleep(time.Second); return nil }
				ctx, cancel := context.WithTimeout(t.Context(), leaves)
				defer cancel()
				var wg sync.WaitGroup
				wg.Go(func() { r.send(ctx, "/", nil) })
				wg.Go(func() {
					time.Sleep(time.Millisecond)
					if _, err := r.send(t.Context(), "/", nil); err != nil || r.opened.Load() > 2 {
						t.Errorf("the other: %v, %d dials", err, r.opened.Load())
					}
				})
				wg.Wait()
				synctest.Wait()
				r.mu.Lock()
				defer r.mu.Unlock()
				for _, c := range r.conns {
					if c.busy != 0 || c.Available() != 1 {
						t.Errorf("a connection without requests has %d, and %d places", c.busy, c.Available())
					}
				}
			})
		})
	}
}

// TestPoolCancelled: a connection on which 100 requests were cancelled takes no further ones, and is closed with its last answer, which is whole.
func TestPoolCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPoolRig(t, true, func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).Flush()
			select {
			case <-time.After(time.Hour):
				io.WriteString(w, "whole")
			case <-r.Context().Done():
			}
		})
		var wg sync.WaitGroup
		wg.Go(func() {
			if got, err := r.send(t.Context(), "/stream", nil); got != "whole" || err != nil {
				t.Errorf("%q, %v", got, err)
			}
		})
		synctest.Wait()
		for i := range 2*cancelledAtMost + 1 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			r.send(ctx, "/", nil)
			cancel()
			synctest.Wait()
			if want := int32(1 + i/cancelledAtMost); r.opened.Load() != want {
				t.Fatalf("%d dials after %d departures, want %d", r.opened.Load(), i+1, want)
			}
		}
		r.mu.Lock()
		first := r.conns[0]
		r.mu.Unlock()
		if first.cancelled < cancelledAtMost || first.Err() != nil {
			t.Errorf("the connection with the stream: %d cancelled, %v", first.cancelled, first.Err())
		}
		wg.Wait()
		synctest.Wait()
		if first.Err() == nil {
			t.Error("it is still open after its last answer")
		}
	})
}

// TestPoolStandstill: a connection whose uploads stand still for more than a second takes no further requests until they move.
func TestPoolStandstill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		read := make(chan struct{})
		r := newPoolRig(t, true, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/unread" {
				<-read
			}
			io.Copy(io.Discard, r.Body)
		})
		var wg sync.WaitGroup
		for range 6 {
			wg.Go(func() {
				if _, err := r.send(t.Context(), "/unread", strings.NewReader(strings.Repeat("x", 2<<20))); err != nil {
					t.Error(err)
				}
			})
		}
		time.Sleep(standstill + time.Millisecond)
		start := time.Now()
		if _, err := r.send(t.Context(), "/", strings.NewReader(strings.Repeat("x", 1<<20))); err != nil || time.Since(start) > time.Second {
			t.Errorf("another upload: %v after %v", err, time.Since(start))
		}
		if r.opened.Load() != 2 {
			t.Errorf("%d dials, want 2", r.opened.Load())
		}
		close(read)
		wg.Wait()
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, c := range r.conns {
			if len(c.uploads) > 0 {
				t.Errorf("%d uploads are still thought to be under way", len(c.uploads))
			}
		}
	})
}

// TestUnprocessed pins what net/http says when an HTTP/2 upstream has not processed a request: it is told by its text.
func TestUnprocessed(t *testing.T) {
	for _, row := range []struct {
		name  string
		frame string // the server's answer, after its settings
		want  bool
	}{
		{name: "refused stream", frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x07", want: true},
		{name: "cancelled by the upstream", frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x08"},
		{name: "internal error", frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x02"},
		{name: "GOAWAY before the stream", frame: "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00", want: true},
		{name: "GOAWAY that includes the stream", frame: "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x01" + "\x00\x00\x00\x00"},
		{name: "closed"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newPoolRig(t, true, nil)
				r.transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
					here, there := net.Pipe()
					go func() {
						go io.Copy(io.Discard, there)
						io.WriteString(there, "\x00\x00\x00\x04\x00\x00\x00\x00\x00") // SETTINGS
						time.Sleep(time.Second)
						io.WriteString(there, row.frame)
						time.Sleep(time.Second)
						there.Close()
					}()
					return newUpstreamConn(ctx, here, time.Minute), nil
				}
				_, err := r.send(t.Context(), "/", strings.NewReader("x"))
				if _, got := errors.AsType[*unprocessedError](err); got != row.want || err == nil {
					t.Errorf("%v: unprocessed %t", err, got)
				}
			})
		})
	}
	for _, text := range []string{"http2: client conn not usable", "http2: client conn could not be established"} {
		if !isUnprocessed(errors.New(text)) {
			t.Error(text)
		}
	}
}
