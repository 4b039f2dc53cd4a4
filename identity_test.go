package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"tailscale.com/client/tailscale/apitype"
	"tailscale.com/tailcfg"
)

// whoisAlice is tailscaled's answer about a person's node.
const whoisAlice = `{"Node":{"Name":"laptop.x.ts.net."},"UserProfile":{"LoginName":"alice@example.com"}}`

// newClient returns a connection, as withConn makes it.
func newClient(t *testing.T) *clientConn {
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	r := (&http.Request{}).WithContext(withConn(context.Background(), here))
	return connOf(r)
}

func TestIdentityOf(t *testing.T) {
	for _, row := range []struct {
		name   string
		answer *apitype.WhoIsResponse
		want   identity
	}{
		{name: "person", answer: &apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "laptop.x.ts.net."}, UserProfile: &tailcfg.UserProfile{LoginName: "a@b"}}, want: identity{"laptop.x.ts.net", "a@b"}},
		{name: "tagged node", answer: &apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "ci.x.ts.net.", Tags: []string{"tag:ci", "tag:prod"}}, UserProfile: &tailcfg.UserProfile{LoginName: "tagged-devices"}}, want: identity{"ci.x.ts.net", "tag:ci,tag:prod"}},
		{name: "no profile", answer: &apitype.WhoIsResponse{Node: &tailcfg.Node{Name: "x."}}, want: identity{node: "x"}},
		{name: "no node", answer: &apitype.WhoIsResponse{UserProfile: &tailcfg.UserProfile{LoginName: "a@b"}}, want: identity{user: "a@b"}},
		{name: "nothing", answer: &apitype.WhoIsResponse{}, want: identity{}},
	} {
		if got := identityOf(row.answer); got != row.want {
			t.Errorf("%s: %+v, want %+v", row.name, got, row.want)
		}
	}
}

// TestAdmit: who is let in, who is refused, and how long it takes with a slow daemon.
func TestAdmit(t *testing.T) {
	answer := func(status int, body string, delay time.Duration) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(delay):
			case <-r.Context().Done():
				return
			}
			w.WriteHeader(status)
			io.WriteString(w, body)
		}
	}
	for _, row := range []struct {
		name     string
		whois    http.HandlerFunc
		required bool
		want     error
		took     time.Duration
		who      identity // in the end
	}{
		{name: "known", whois: answer(200, whoisAlice, time.Second), who: identity{"laptop.x.ts.net", "alice@example.com"}},
		{name: "known, required", whois: answer(200, whoisAlice, time.Second), required: true, took: time.Second, who: identity{"laptop.x.ts.net", "alice@example.com"}},
		{name: "unknown", whois: answer(404, "", time.Second)},
		{name: "unknown, required", whois: answer(404, "", time.Second), required: true, took: time.Second, want: errUnknownCaller},
		{name: "daemon fails, required", whois: answer(500, "", 0), required: true, want: errUnknownCaller},
		{name: "daemon hangs, required", whois: answer(200, whoisAlice, time.Hour), required: true, took: lookupTimeout, want: errUnknownCaller},
		{name: "daemon hangs", whois: answer(200, whoisAlice, time.Hour)},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string), whois: row.whois}
				tn, _ := followed(t, d)
				conn := newClient(t)
				start := time.Now()
				err := tn.admit(t.Context(), conn, row.required)
				if took := time.Since(start); !errors.Is(err, row.want) && err != row.want || took != row.took {
					t.Errorf("%v after %v, want %v after %v", err, took, row.want, row.took)
				}
				time.Sleep(3 * time.Second)
				if who, pending := conn.caller(); who != row.who || pending != nil {
					t.Errorf("in the end it is %+v (pending: %t), want %+v", who, pending != nil, row.who)
				}
			})
		})
	}
}

// TestOneLookupPerConnection: however many requests come, at once or later. A failed lookup is repeated by the
// next request, an answer never.
func TestOneLookupPerConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lookups atomic.Int32
		d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string), whois: func(w http.ResponseWriter, _ *http.Request) {
			time.Sleep(time.Second)
			if lookups.Add(1) == 1 {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			io.WriteString(w, whoisAlice)
		}}
		tn, _ := followed(t, d)
		conn := newClient(t)
		for round, want := range []int32{1, 2, 2} {
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if err := tn.admit(t.Context(), conn, true); (err == nil) != (round > 0) {
						t.Errorf("round %d: %v", round, err)
					}
				})
			}
			wg.Wait()
			if n := lookups.Load(); n != want {
				t.Errorf("round %d: %d lookups so far, want %d", round, n, want)
			}
		}
	})
}

// TestLookupsAreLimited: tailscaled is asked about 16 callers at once at most, and the others wait no longer than
// for a lookup.
func TestLookupsAreLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var now, most atomic.Int32
		d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string), whois: func(w http.ResponseWriter, _ *http.Request) {
			n := now.Add(1)
			defer now.Add(-1)
			for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
			}
			time.Sleep(900 * time.Millisecond)
			io.WriteString(w, whoisAlice)
		}}
		tn, _ := followed(t, d)
		var wg sync.WaitGroup
		var admitted atomic.Int32
		start := time.Now()
		for range 3 * maxLookups {
			conn := newClient(t)
			wg.Go(func() {
				if tn.admit(t.Context(), conn, true) == nil {
					admitted.Add(1)
				}
			})
		}
		wg.Wait()
		// Two rounds of 16 fit into the two seconds; the third is cut off.
		if took := time.Since(start); most.Load() != maxLookups || admitted.Load() != 2*maxLookups || took != lookupTimeout {
			t.Errorf("%d at once, %d admitted, %v; want %d, %d, %v", most.Load(), admitted.Load(), took, maxLookups, 2*maxLookups, lookupTimeout)
		}
	})
}

// TestAdmitClientLeaves: nobody waits for the identity of a caller that is gone.
func TestAdmitClientLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{status: daemonStatus("Running", "node-1."), bus: make(chan string), whois: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }}
		tn, _ := followed(t, d)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if err := tn.admit(ctx, newClient(t), true); err != errClientGone || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		time.Sleep(lookupTimeout)
	})
}

// TestNoConnection: a request that did not come over a server's connection has no identity.
func TestNoConnection(t *testing.T) {
	if conn := connOf(&http.Request{}); conn != nil {
		t.Errorf("there is a connection: %v", conn)
	}
	var none *clientConn
	if who, pending := none.caller(); who != (identity{}) || pending != nil {
		t.Errorf("nobody is %+v", who)
	}
	tn, _ := newTestTailnet()
	if err := tn.admit(t.Context(), nil, true); err != errUnknownCaller {
		t.Errorf("nobody is admitted: %v", err)
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

// TestTailnetDecides: before the first connection 503, after a loss requests are still served, and strangers get
// 403 if callers must be known.
func TestTailnetDecides(t *testing.T) {
	up, down := &tailnetState{hostname: "node-1"}, &tailnetState{problem: &problem{tailnetNotRunning, "x"}}
	for _, row := range []struct {
		name     string
		states   []*tailnetState
		required bool
		status   int
		header   string
	}{
		{name: "nothing seen", status: 503, header: "Retry-After: 2"},
		{name: "not connected yet", states: []*tailnetState{down}, status: 503, header: "Retry-After: 2"},
		{name: "connected", states: []*tailnetState{up}, status: 200},
		{name: "lost", states: []*tailnetState{up, down}, status: 200},
		{name: "connected, stranger", states: []*tailnetState{up}, required: true, status: 403},
		{name: "not connected yet, stranger", states: []*tailnetState{down}, required: true, status: 503, header: "Retry-After: 2"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", echo)
				tn, _ := newTestTailnet()
				tn.client.Transport = &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return nil, io.EOF }}
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
