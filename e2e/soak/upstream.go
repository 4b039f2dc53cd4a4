package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// upstream is the API behind one proxy. It does what each request's plan says, and keeps nothing of a request but how often it came.
type upstream struct {
	*fakeanthropic.Server
	seed     uint64
	problems *problems
	verified atomic.Int64 // bytes of requests

	mu       sync.Mutex
	attempts map[int]int // by the request's number
}

func startUpstream(protocol fakeanthropic.Protocol, seed uint64, problems *problems) (*upstream, error) {
	u := &upstream{seed: seed, problems: problems, attempts: map[int]int{}}
	var err error
	if u.Server, err = fakeanthropic.Start(protocol, u); err != nil {
		return nil, err
	}
	u.Forget()
	return u, nil
}

// seen returns how often the request with this number came.
func (u *upstream) seen(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.attempts[number]
}

// upstreamID is how the Request-Id of an answer begins, which its attempt follows.
func upstreamID(number int) string { return fmt.Sprintf("up_%d_", number) }

// ServeHTTP does what the request's plan says. Where it panics, net/http resets the stream or connection, in place of ending the
// answer as if it were whole.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number, err := numberOf(r.URL.Path)
	if err != nil {
		u.problems.add("the upstream got a request that nobody sent: %v", err)
		http.NotFound(w, r)
		return
	}
	u.mu.Lock()
	u.attempts[number]++
	attempt := u.attempts[number]
	u.mu.Unlock()
	p := newPlan(u.seed, number)
	w.Header().Set("Request-Id", upstreamID(number)+strconv.Itoa(attempt))
	if h := r.Header; r.Method != p.method || h.Get("Authorization") != authorization || h.Get("Anthropic-Beta") != fakeanthropic.OAuthBeta {
		u.problems.add("%v: it reached the upstream as %s with the headers %v", p, r.Method, h)
	}
	if !p.early && !u.receive(p, r) {
		w.WriteHeader(http.StatusUnprocessableEntity) // which no plan expects
		return
	}
	switch {
	case p.fault == upstreamRefuses:
		refuse(w, p)
	case attempt <= p.silent:
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	pause(r.Context(), p.delay)
	answer(w, p, r)
}

// receive reads the request's body and tells whether it is right; of one that breaks off, what came.
func (u *upstream) receive(p plan, r *http.Request) bool {
	got := &checker{want: p.request.bytes()}
	_, broken := io.Copy(got, r.Body)
	wrong := got.wrong
	if broken == nil {
		wrong = got.whole(r.Header.Get(digestHeader))
	}
	if wrong != nil {
		u.problems.add("%v: it reached the upstream with a wrong body: %v", p, wrong)
		return false
	}
	u.verified.Add(got.n)
	if broken != nil {
		panic(http.ErrAbortHandler) // the proxy has given this attempt up
	}
	return true
}

// refuse resets the stream, or the connection of HTTP/1.1.
func refuse(w http.ResponseWriter, p plan) {
	if conn, _, err := http.NewResponseController(w).Hijack(); err == nil {
		if p.reset {
			resetOnClose(conn.(*tls.Conn).NetConn())
		}
		conn.Close()
	}
	panic(http.ErrAbortHandler)
}

// pause waits for d, unless the proxy gives up before.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
		panic(http.ErrAbortHandler)
	}
}

// header is that of p's answer, which has this body.
func (p plan) header(body []byte) http.Header {
	h := http.Header{"Content-Type": {"application/octet-stream"}}
	switch p.answer.form {
	case eventForm:
		h.Set("Content-Type", "text/event-stream; charset=utf-8")
	case gzipForm:
		h.Set("Content-Encoding", "gzip")
	}
	if p.declared {
		h.Set("Content-Length", strconv.Itoa(len(body)))
		h.Set(digestHeader, digest(body))
	} else {
		h.Set("Trailer", digestHeader)
	}
	return h
}

// answer sends the answer of the plan, events one by one, all else as fast as it goes.
func answer(w http.ResponseWriter, p plan, r *http.Request) {
	body := p.answer.bytes()
	maps.Copy(w.Header(), p.header(body))
	w.WriteHeader(p.status)
	if p.method == http.MethodHead {
		return
	}
	sends, piece := body, len(body)
	if p.fault == upstreamBreaksOff || p.fault == upstreamFallsSilent {
		sends = body[:p.cut]
	}
	if p.answer.form == eventForm {
		piece = eventSize
	}
	for part := range slices.Chunk(sends, piece) {
		w.Write(part) // Flush tells of a failure
		if http.NewResponseController(w).Flush() != nil {
			panic(http.ErrAbortHandler) // the proxy has left
		}
		pause(r.Context(), p.pace)
	}
	if p.fault == upstreamFallsSilent {
		<-r.Context().Done()
	}
	if len(sends) < len(body) {
		panic(http.ErrAbortHandler)
	}
	if !p.declared {
		w.Header().Set(digestHeader, digest(body))
	}
}
