package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	alice   = identity{node: "laptop.x.ts.net", user: "alice@example.com"}
	granted = identity{node: "laptop.x.ts.net", user: "alice@example.com", capable: true}
)

// newClient returns a connection, as withConn makes it.
func newClient(t *testing.T) *clientConn {
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	return connOf((&http.Request{}).WithContext(withConn(context.Background(), &clientConn{Conn: here})))
}

// TestRequireCaller: who is let in, who is refused, and how long it takes.
func TestRequireCaller(t *testing.T) {
	type row struct {
		who    identity
		err    error         // of the look-up, after a second
		leaves time.Duration // when the client does
		want   error
		needs  string // the capability
	}
	inBubbles(t, map[string]row{
		"known":                        {who: alice, leaves: time.Hour},
		"unknown":                      {leaves: time.Hour, want: errUnknownCaller},
		"granted":                      {who: granted, needs: "example.com/cap/claude", leaves: time.Hour},
		"not granted":                  {who: alice, needs: "example.com/cap/claude", leaves: time.Hour, want: errNotGranted("example.com/cap/claude", alice.node)},
		"no answer":                    {err: context.DeadlineExceeded, leaves: time.Hour, want: errLookupFailed},
		"nobody waits for who is gone": {who: alice, leaves: time.Millisecond, want: errClientGone},
	}, func(t *testing.T, row row) {
		ctx, cancel := context.WithTimeout(t.Context(), row.leaves)
		defer cancel()
		start := time.Now()
		l := newClient(t).caller(time.Hour, func(context.Context, string) (identity, error) {
			time.Sleep(time.Second)
			return row.who, row.err
		})
		holds(t, l.pending() && l.answer() == (identity{}), "there is an answer before tailscaled gave one")
		equal(t, "the error", fmt.Sprint(l.require(ctx, row.needs)), fmt.Sprint(row.want))
		equal(t, "took", time.Since(start), min(time.Second, row.leaves))
		<-l.done
		equal(t, "who it is", l.answer(), row.who)
	})
}

// TestOneLookupPerConnection: however many requests come, at once or later. A failed look-up is repeated by the
// next request, an answer once it is as old as it may be.
func TestOneLookupPerConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lookups atomic.Int32
		whoIs := func(context.Context, string) (identity, error) {
			time.Sleep(time.Second)
			if lookups.Add(1) == 1 {
				return identity{}, errors.New("tailscaled fails")
			}
			return alice, nil
		}
		conn := newClient(t)
		for round, want := range []int32{1, 2, 2, 3} {
			if round == 3 {
				time.Sleep(time.Minute)
			}
			together(10, func(int) {
				err := conn.caller(time.Minute, whoIs).require(t.Context(), "")
				holds(t, (err == nil) == (round > 0), "round %d: %v", round, err)
			})
			equal(t, fmt.Sprint("look-ups up to round ", round), lookups.Load(), want)
		}
	})
}

// TestConnectionsAreBounded: when they are full, the one that has had no request for the longest time is closed for a newer one;
// when all have one, clients wait, and take turns.
func TestConnectionsAreBounded(t *testing.T) {
	const get = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
	inBubble(t, "idle ones make room", func(t *testing.T) {
		r := newRig(t, "", echo)
		var idle []*rawConnection
		for range rigConnections {
			idle = append(idle, r.dialRaw())
			time.Sleep(time.Millisecond)
		}
		time.Sleep(idleGrace)
		idle[0].send(get)
		equal(t, "the status", idle[0].answer().status, 200)
		idle[1].send(get[:10])
		synctest.Wait()
		newest := r.dialRaw()
		go newest.send(get)
		newest.answer().expect(t, "200 after 0s")
		holds(t, idle[2].send(get) != nil, "the connection that was idle longest is still open")
		idle[1].send(get[10:])
		equal(t, "the status, for who had begun a request", idle[1].answer().status, 200)
		equal(t, "sending on another one", idle[3].send(get), nil)
		equal(t, "open connections", r.clients.connections(), rigConnections)
	})
	inBubble(t, "busy ones do not", func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, _ *http.Request) { time.Sleep(50 * time.Second) })
		var late atomic.Int32
		together(2*rigConnections, func(int) {
			got := r.ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			holds(t, got.status == 200 && got.took <= 100*time.Second+idleGrace, "%+v", got)
			if got.took > 50*time.Second {
				late.Add(1)
			}
		})
		holds(t, late.Load() <= rigConnections, "%d clients waited, want %d", late.Load(), rigConnections)
	})
}

// TestStillReaders: those who have read nothing for the longest time are cut when there are too many, and nobody else is.
func TestStillReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 4*bulkBuffer)) })
		var still []*rawConnection
		for range rigConnections/stallShare + 2 {
			c := r.dialRaw()
			c.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n")
			still = append(still, c)
			time.Sleep(stallGrace / 4)
		}
		time.Sleep(2 * stallGrace)
		for i, c := range still {
			got := c.answer()
			holds(t, (got.err == nil) == (i >= 2), "client %d: %d bytes, %v", i, len(got.body), got.err)
		}
		r.expectNothingLeft()
		for _, line := range r.log.lines(t, "request completed")[:2] {
			line.expect(t, "status", 499.0, "error", errSlowReader.Error())
		}
	})
}

// TestHeaderBounds: the time and the size of what comes before a request's body.
func TestHeaderBounds(t *testing.T) {
	const get, end = "GET /livez HTTP/1.1\r\nHost: x\r\n", "\r\n"
	fields := func(n int) string { return strings.Repeat("a: b\r\n", n) }
	type row struct {
		sent   []string      // and a pause after each
		pause  time.Duration // longer than a moment
		second bool          // on a connection that has had a request
		status int           // 0: closed without an answer
	}
	inBubbles(t, map[string]row{
		"a request after 29 s":           {sent: []string{"", get + end}, pause: 29 * time.Second, status: 200},
		"nothing for 31 s":               {sent: []string{"", get + end}, pause: 31 * time.Second},
		"headers within 9 s":             {sent: []string{get, end}, pause: 9 * time.Second, status: 200},
		"headers that take 11 s":         {sent: []string{get, end}, pause: 11 * time.Second},
		"256 fields":                     {sent: []string{get + fields(255) + end}, status: 200},
		"257 fields":                     {sent: []string{get + fields(256) + end}, status: 431},
		"256 fields again":               {second: true, sent: []string{get + fields(255) + end}, status: 200},
		"257 fields in a second request": {second: true, sent: []string{get + fields(256) + end}, status: 431},
		"many fields, and no end":        {sent: []string{get + fields(5000)}, status: 431},
		"60 KiB":                         {sent: []string{get + "a: " + strings.Repeat("x", 60<<10) + "\r\n" + end}, status: 200},
		"over 64 KiB":                    {sent: []string{get + "a: " + strings.Repeat("x", 70<<10) + "\r\n" + end}, status: 431},
	}, func(t *testing.T, row row) {
		r := newRig(t, "", echo)
		c := r.dialRaw()
		defer c.Close()
		if row.second {
			go c.send(get + fields(200) + end)
			c.answer()
		}
		go func() {
			for _, text := range row.sent {
				c.send(text)
				time.Sleep(row.pause)
			}
		}()
		equal(t, "the status", c.answer().status, row.status)
		c.Close()
		synctest.Wait()
		taken, _ := r.clients.headers.load()
		equal(t, "still charged for headers", taken, 0)
	})
}
