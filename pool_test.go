package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// newPoolRig returns a rig whose pool is used directly.
func newPoolRig(t *testing.T, http2 bool, upstream http.HandlerFunc) *rig {
	r := newRig(t, "", upstream)
	r.overHTTP2(http2)
	return r
}

// conns returns the connections of the pool.
func (r *rig) conns() []*pooledConn {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	return slices.Clone(r.pool.conns)
}

// send makes one request over the pool and reads its whole answer.
func (r *rig) send(ctx context.Context, path string, body io.Reader) (string, error) {
	conn, err := r.pool.reserve(ctx)
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

// slowly is a handshake that takes as long as given.
func slowly(d time.Duration) func(int, net.Conn) (net.Conn, error) {
	return func(_ int, conn net.Conn) (net.Conn, error) {
		time.Sleep(d)
		return conn, nil
	}
}

// TestPoolColdStart: while it is not known what the upstream speaks, one connection is opened; then as many as are needed, for all who
// wait at once.
func TestPoolColdStart(t *testing.T) {
	type row struct {
		http2 bool
		dials int32
	}
	inBubbles(t, map[string]row{"HTTP/2": {true, 3}, "HTTP/1.1": {false, 300}}, func(t *testing.T, row row) {
		r := newPoolRig(t, row.http2, func(http.ResponseWriter, *http.Request) { time.Sleep(time.Second) })
		r.wrap = slowly(300 * time.Millisecond)
		start := time.Now()
		together(300, func(int) {
			_, err := r.send(t.Context(), "/", nil)
			equal(t, "the error", err, nil)
		})
		// One handshake to learn what the upstream speaks, one for the others, and a second for the answer.
		equal(t, "all answered after", time.Since(start), 1600*time.Millisecond)
		equal(t, "dials", r.dials.Load(), row.dials)
	})
}

// TestPoolReuse: one connection serves requests that come one after the other, and is closed when it was unused for five minutes.
func TestPoolReuse(t *testing.T) {
	inBubbles(t, map[string]bool{"HTTP/2": true, "HTTP/1.1": false}, func(t *testing.T, http2 bool) {
		r := newPoolRig(t, http2, echo)
		for i, pause := range []time.Duration{0, 0, upstreamIdle - time.Second, upstreamIdle - time.Second, upstreamIdle + time.Second} {
			time.Sleep(pause)
			synctest.Wait()
			got, err := r.send(t.Context(), "/", strings.NewReader("x"))
			holds(t, got == "x" && err == nil, "request %d: %q, %v", i, got, err)
			equal(t, fmt.Sprint("dials after request ", i), r.dials.Load(), int32(1+i/4)) // the last has its own
		}
	})
}

// TestPoolDialFails: the failure goes to those who waited when the dial began. Who comes later gets a dial of their own.
func TestPoolDialFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newPoolRig(t, true, echo)
		r.wrap = func(n int, conn net.Conn) (net.Conn, error) {
			time.Sleep(time.Second)
			return failing(syscall.ECONNREFUSED, 1)(n, conn)
		}
		start := time.Now()
		together(20, func(i int) {
			if i > 0 {
				time.Sleep(time.Millisecond)
			}
			_, err := r.send(t.Context(), "/", nil)
			_, dial := errors.AsType[*dialError](err)
			if took := time.Since(start); i == 0 {
				holds(t, dial && errors.Is(err, syscall.ECONNREFUSED) && took == time.Second, "at first: %v after %v", err, took)
			} else {
				holds(t, err == nil && took == 2*time.Second, "later: %v after %v", err, took)
			}
		})
		equal(t, "dials", r.dials.Load(), 2)
	})
}

// TestPoolWaiterLeaves: the dial that it has begun goes on for the others, and a place that comes too late is not lost.
func TestPoolWaiterLeaves(t *testing.T) {
	inBubbles(t, map[string]time.Duration{"before": 500 * time.Millisecond, "at the same moment": time.Second}, func(t *testing.T, leaves time.Duration) {
		r := newPoolRig(t, false, echo)
		r.wrap = slowly(time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), leaves)
		defer cancel()
		go r.send(ctx, "/", nil)
		time.Sleep(time.Millisecond)
		_, err := r.send(t.Context(), "/", nil)
		holds(t, err == nil && r.dials.Load() <= 2, "the other: %v, %d dials", err, r.dials.Load())
		synctest.Wait()
		for _, c := range r.conns() {
			holds(t, c.inUse == 0 && c.Available() == 1, "a connection without requests has %d, and %d places", c.inUse, c.Available())
		}
	})
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
			got, err := r.send(t.Context(), "/stream", nil)
			holds(t, got == "whole" && err == nil, "%q, %v", got, err)
		})
		synctest.Wait()
		for i := range 2*cancelledAtMost + 1 {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			r.send(ctx, "/", nil)
			cancel()
			synctest.Wait()
			equal(t, fmt.Sprint("dials after departure ", i), r.dials.Load(), int32(1+i/cancelledAtMost))
		}
		first := r.conns()[0]
		holds(t, first.cancelled >= cancelledAtMost && first.Err() == nil, "the connection with the stream: %d cancelled, %v", first.cancelled, first.Err())
		wg.Wait()
		synctest.Wait()
		holds(t, first.Err() != nil, "it is still open after its last answer")
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
		wg.Go(func() {
			together(6, func(int) {
				_, err := r.send(t.Context(), "/unread", strings.NewReader(strings.Repeat("x", 2<<20)))
				equal(t, "the error of an unread one", err, nil)
			})
		})
		time.Sleep(uploadStall + time.Millisecond)
		start := time.Now()
		_, err := r.send(t.Context(), "/", strings.NewReader(strings.Repeat("x", 1<<20)))
		holds(t, err == nil && time.Since(start) <= time.Second, "another upload: %v after %v", err, time.Since(start))
		equal(t, "dials", r.dials.Load(), 2)
		close(read)
		wg.Wait()
		for _, c := range r.conns() {
			equal(t, "uploads that are thought to be under way", len(c.uploads), 0)
		}
	})
}

// TestUnprocessed pins what net/http says when an HTTP/2 upstream has not processed a request: it is told by its text.
func TestUnprocessed(t *testing.T) {
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	type row struct {
		frame string // the server's answer, after its settings
		early bool   // it closes after the preface
		want  bool   // it was not processed
	}
	inBubbles(t, map[string]row{
		"refused stream":                  {frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x07", want: true},
		"cancelled by the upstream":       {frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x08"},
		"internal error":                  {frame: "\x00\x00\x04\x03\x00\x00\x00\x00\x01" + "\x00\x00\x00\x02"},
		"GOAWAY before the stream":        {frame: "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00", want: true},
		"GOAWAY that includes the stream": {frame: "\x00\x00\x08\x07\x00\x00\x00\x00\x00" + "\x00\x00\x00\x01" + "\x00\x00\x00\x00"},
		"closed":                          {},
		"closed before the request":       {early: true},
	}, func(t *testing.T, row row) {
		r := newPoolRig(t, true, nil)
		r.serveRaw(func(conn net.Conn) {
			defer conn.Close()
			io.ReadFull(conn, make([]byte, len(preface)))
			if row.early {
				return
			}
			go io.Copy(io.Discard, conn)
			io.WriteString(conn, "\x00\x00\x00\x04\x00\x00\x00\x00\x00") // SETTINGS
			time.Sleep(time.Second)
			io.WriteString(conn, row.frame)
			time.Sleep(time.Second)
		})
		_, err := r.send(t.Context(), "/", strings.NewReader("x"))
		_, got := errors.AsType[*unprocessedError](err)
		holds(t, got == row.want && err != nil && r.dials.Load() == 1, "%v after %d dials: unprocessed %t", err, r.dials.Load(), got)
	})
}
