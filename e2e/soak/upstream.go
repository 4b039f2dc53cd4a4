package main

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// upstream is the API behind one proxy. It does what each request's plan says, and
// keeps nothing of a request but how often it came: package fakeanthropic keeps the
// bodies, which half an hour has too many of.
type upstream struct {
	server   *httptest.Server
	seed     uint64
	problems *problems

	mu       sync.Mutex
	attempts map[int]int // by the request's number
	verified int64       // bytes of requests
}

// startUpstream starts it, with HTTP/2 or HTTP/1.1 over TLS.
func startUpstream(http2 bool, seed uint64, problems *problems) *upstream {
	u := &upstream{seed: seed, problems: problems, attempts: map[int]int{}}
	u.server = httptest.NewUnstartedServer(u)
	u.server.EnableHTTP2 = http2
	u.server.Config.ErrorLog = log.New(io.Discard, "", 0) // connections that break are the point
	u.server.StartTLS()
	return u
}

// writeCA writes the certificate that the proxy has to trust into dir.
func (u *upstream) writeCA(dir string) (file string, err error) {
	file = filepath.Join(dir, "ca.pem")
	block := &pem.Block{Type: "CERTIFICATE", Bytes: u.server.Certificate().Raw}
	return file, os.WriteFile(file, pem.EncodeToMemory(block), 0o600)
}

// close ends everything.
func (u *upstream) close() {
	u.server.CloseClientConnections()
	u.server.Close()
}

// seen returns how often the request with this number came.
func (u *upstream) seen(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.attempts[number]
}

// arrived counts an attempt at a request and returns which it is, from 1 on.
func (u *upstream) arrived(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.attempts[number]++
	return u.attempts[number]
}

// upstreamID is how the Request-Id of an answer begins, which its attempt follows.
func upstreamID(number int) string { return fmt.Sprintf("up_%d_", number) }

// ServeHTTP does what the request's plan says. Where it panics, net/http resets the
// stream or connection, in place of ending the answer as if it were whole.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number, err := numberOf(r.URL.Path)
	if err != nil {
		u.problems.add("the upstream got a request that nobody sent: %v", err)
		http.NotFound(w, r)
		return
	}
	p, attempt := newPlan(u.seed, number), u.arrived(number)
	w.Header().Set("Request-Id", upstreamID(number)+strconv.Itoa(attempt))
	if h := r.Header; r.Method != p.method || h.Get("Authorization") != authorization || h.Get("Anthropic-Beta") != fakeanthropic.OAuthBeta {
		u.problems.add("%v: it reached the upstream as %s with authorization %q and anthropic-beta %q",
			p, r.Method, h.Get("Authorization"), h.Get("Anthropic-Beta"))
	}
	if !p.early && !u.receive(p, r) {
		w.WriteHeader(http.StatusUnprocessableEntity) // which no plan expects
		return
	}
	if p.fault == upstreamRefuses {
		refuse(w, p)
	}
	if attempt <= p.silent {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	pause(r.Context(), p.delay)
	answer(w, p, r)
}

// receive reads the request's body and tells whether it is right; of one that breaks off, what came.
func (u *upstream) receive(p plan, r *http.Request) bool {
	got := &checker{want: p.request.bytes()}
	_, err := io.Copy(got, r.Body)
	wrong := got.wrong
	if err == nil {
		wrong = got.whole(r.Header.Get(digestHeader))
	}
	if wrong != nil {
		u.problems.add("%v: it reached the upstream with a wrong body: %v", p, wrong)
		return false
	}
	u.mu.Lock()
	u.verified += int64(got.n)
	u.mu.Unlock()
	if err != nil {
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

// answer sends the answer of the plan, with its checksum in a header or, if it
// declares no length, in a trailer: events one by one, all else as fast as it goes.
func answer(w http.ResponseWriter, p plan, r *http.Request) {
	body, header, out := p.answer.bytes(), w.Header(), http.NewResponseController(w)
	header.Set("Content-Type", p.answer.contentType())
	if encoding := p.answer.encoding(); encoding != "" {
		header.Set("Content-Encoding", encoding)
	}
	if p.declared {
		header.Set("Content-Length", strconv.Itoa(len(body)))
		header.Set(digestHeader, digest(body))
	} else {
		header.Set("Trailer", digestHeader)
	}
	w.WriteHeader(p.status)
	switch {
	case p.method == http.MethodHead:
		return
	case p.fault == upstreamBreaksOff, p.fault == upstreamFallsSilent:
		w.Write(body[:p.cut]) // the proxy may have left, which ends the wait too
		out.Flush()
		if p.fault == upstreamFallsSilent {
			<-r.Context().Done()
		}
		panic(http.ErrAbortHandler)
	}
	piece := len(body)
	if p.answer.form == eventForm {
		piece = eventSize
	}
	for ; len(body) > 0; body = body[piece:] {
		_, err := w.Write(body[:piece])
		if err == nil && p.answer.form == eventForm {
			err = out.Flush()
		}
		if err != nil {
			panic(http.ErrAbortHandler) // the proxy has left
		}
		pause(r.Context(), p.pace)
	}
	if !p.declared {
		header.Set(digestHeader, digest(p.answer.bytes()))
	}
}
