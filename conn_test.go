package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var alice = identity{node: "laptop.x.ts.net", user: "alice@example.com"}

// newClient returns a connection, as withConn makes it.
func newClient(t *testing.T) *clientConn {
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	return connOf((&http.Request{}).WithContext(withConn(context.Background(), &clientConn{Conn: here})))
}

// TestRequireCaller: who is let in, who is refused, and how long it takes.
func TestRequireCaller(t *testing.T) {
	for _, row := range []struct {
		name   string
		who    identity
		err    error         // of the look-up, after a second
		leaves time.Duration // when the client does
		want   error
	}{
		{name: "known", who: alice, leaves: time.Hour},
		{name: "unknown", leaves: time.Hour, want: errUnknownCaller},
		{name: "no answer", err: context.DeadlineExceeded, leaves: time.Hour, want: errCallerPending},
		{name: "nobody waits for who is gone", who: alice, leaves: time.Millisecond, want: errClientGone},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), row.leaves)
			defer cancel()
			start := time.Now()
			l := newClient(t).caller(func(context.Context, string) (identity, error) {
				time.Sleep(time.Second)
				return row.who, row.err
			})
			if !l.pending() || l.answer() != (identity{}) {
				t.Error("there is an answer before tailscaled gave one")
			}
			took := min(time.Second, row.leaves)
			if err := l.require(ctx); !errors.Is(err, row.want) || time.Since(start) != took {
				t.Errorf("%v after %v, want %v after %v", err, time.Since(start), row.want, took)
			}
			<-l.done
			if l.answer() != row.who {
				t.Errorf("it is %+v, want %+v", l.answer(), row.who)
			}
		})
	}
}

// TestOneLookupPerConnection: however many requests come, at once or later. A failed look-up is repeated by the
// next request, an answer never.
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
		for round, want := range []int32{1, 2, 2} {
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if err := conn.caller(whoIs).require(t.Context()); (err == nil) != (round > 0) {
						t.Errorf("round %d: %v", round, err)
					}
				})
			}
			wg.Wait()
			if n := lookups.Load(); n != want {
				t.Errorf("round %d: %d look-ups so far, want %d", round, n, want)
			}
		}
	})
}
