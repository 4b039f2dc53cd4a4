package main

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	digestHeader = "X-Soak-Sha256"
	oauthBeta    = "oauth-2025-04-20" // what the proxy adds
)

// upstream is the API behind one proxy. It does what each request's plan says, and
// keeps nothing of a request but how often it came: package fakeanthropic keeps the
// bodies, which half an hour has too many of.
type upstream struct {
	server   *httptest.Server
	caFile   string
	seed     uint64
	problems *problems

	mu       sync.Mutex
	attempts map[int]int // by the request's number
	verified int64       // bytes of requests
}

// startUpstream starts it, with HTTP/2 or HTTP/1.1 over TLS.
func startUpstream(http2 bool, seed uint64, problems *problems) (*upstream, error) {
	u := &upstream{seed: seed, problems: problems, attempts: map[int]int{}}
	u.server = httptest.NewUnstartedServer(u)
	u.server.EnableHTTP2 = http2
	u.server.Config.ErrorLog = log.New(io.Discard, "", 0) // connections that break are the point
	u.server.StartTLS()
	f, err := os.CreateTemp("", "soak-ca-*.pem")
	if err == nil {
		u.caFile = f.Name()
		defer f.Close()
		err = pem.Encode(f, &pem.Block{Type: "CERTIFICATE", Bytes: u.server.Certificate().Raw})
	}
	if err != nil {
		u.close()
		return nil, fmt.Errorf("writing the upstream's certificate: %w", err)
	}
	return u, nil
}

// hangUp closes all connections that are idle, as they all are after the traffic.
func (u *upstream) hangUp() { u.server.CloseClientConnections() }

// close ends everything.
func (u *upstream) close() {
	u.hangUp()
	u.server.Close()
	if u.caFile != "" {
		_ = os.Remove(u.caFile) // a leftover in the temporary folder does no harm
	}
}

// seen returns how often the request with this number came.
func (u *upstream) seen(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.attempts[number]
}

// totals returns how many requests came, and how many of their bytes were right.
func (u *upstream) totals() (requests int, verified int64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for _, n := range u.attempts {
		requests += n
	}
	return requests, u.verified
}

// arrived counts an attempt at a request and returns which it is, from 1 on.
func (u *upstream) arrived(number int) int {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.attempts[number]++
	return u.attempts[number]
}

// upstreamID names an answer in its Request-Id.
func upstreamID(number, attempt int) string { return fmt.Sprintf("up_%d_%d", number, attempt) }

// answerTo returns the number of the request that an answer with this Request-Id is
// for; ok is false for an answer of the proxy's own.
func answerTo(id string) (number int, ok bool) {
	rest, ok := strings.CutPrefix(id, "up_")
	digits, _, _ := strings.Cut(rest, "_")
	number, err := strconv.Atoi(digits)
	return number, ok && err == nil
}

// ServeHTTP does what the request's plan says.
func (u *upstream) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number, err := numberOf(r.URL.Path)
	if err != nil {
		u.problems.add("the upstream got a request that nobody sent: %v", err)
		http.NotFound(w, r)
		return
	}
	p, attempt := newPlan(u.seed, number), u.arrived(number)
	w.Header().Set("Request-Id", upstreamID(number, attempt))
	u.checkHeader(p, r)
	if !p.early && !u.receive(w, p, r) {
		return
	}
	switch p.fault {
	case upstreamRefuses:
		refuse(w, p)
	case upstreamSilent, clientLeavesWaiting:
		abandoned(r.Context())
	case upstreamSilentOnce:
		if attempt == 1 {
			abandoned(r.Context())
		}
	case upstreamSlow:
		pause(r.Context(), p.pause)
	}
	answer(w, p, r)
}

// checkHeader checks what must not be lost on the way.
func (u *upstream) checkHeader(p plan, r *http.Request) {
	if r.Method != p.method || r.Header.Get("Authorization") != authorization || r.Header.Get("Anthropic-Beta") != oauthBeta {
		u.problems.add("%v: it reached the upstream as %s with authorization %q and anthropic-beta %q",
			p, r.Method, r.Header.Get("Authorization"), r.Header.Get("Anthropic-Beta"))
	}
}

// receive reads the request's body and checks it; of one that breaks off, what came.
// ok is false if the answer is given: an error that no plan expects.
func (u *upstream) receive(w http.ResponseWriter, p plan, r *http.Request) (ok bool) {
	got := newChecker(p.request)
	_, err := io.Copy(got, r.Body)
	wrong := got.prefix()
	if err == nil {
		wrong = got.whole(r.Header.Get(digestHeader))
	}
	if wrong != nil {
		u.problems.add("%v: it reached the upstream with a wrong body: %v", p, wrong)
		w.WriteHeader(http.StatusUnprocessableEntity)
		return false
	}
	u.mu.Lock()
	u.verified += got.n
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

// resetOnClose has conn end with a TCP reset.
func resetOnClose(conn net.Conn) {
	_ = conn.(*net.TCPConn).SetLinger(0) // fails only on a connection that is closed
}

// abandoned waits until the proxy gives up.
func abandoned(ctx context.Context) {
	<-ctx.Done()
	panic(http.ErrAbortHandler) // or else net/http would answer 200
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
// declares no length, in a trailer.
func answer(w http.ResponseWriter, p plan, r *http.Request) {
	header := w.Header()
	header.Set("Content-Type", p.contentType())
	if p.answer.form == gzipForm {
		header.Set("Content-Encoding", "gzip")
	}
	if p.declared {
		header.Set("Content-Length", strconv.FormatInt(p.answer.size, 10))
		header.Set(digestHeader, p.answer.digest())
	} else {
		header.Set("Trailer", digestHeader)
	}
	w.WriteHeader(p.status)
	if p.method == http.MethodHead {
		return
	}
	sum := sha256.New()
	body := io.TeeReader(p.answer.reader(), sum)
	if p.fault == upstreamBreaksOff || p.fault == upstreamFallsSilent {
		breakOff(w, p, r, body)
	}
	if err := send(w, p, r, body); err != nil {
		panic(http.ErrAbortHandler) // the proxy has left
	}
	if !p.declared {
		header.Set(digestHeader, digestOf(sum))
	}
}

// contentType is that of p's answer.
func (p plan) contentType() string {
	if p.answer.form == eventForm {
		return "text/event-stream; charset=utf-8"
	}
	return "application/octet-stream"
}

// breakOff sends the beginning of the answer, and no more.
func breakOff(w http.ResponseWriter, p plan, r *http.Request, body io.Reader) {
	io.CopyN(w, body, p.at) // the proxy may have left, which ends the wait too
	http.NewResponseController(w).Flush()
	if p.fault == upstreamFallsSilent {
		abandoned(r.Context())
	}
	panic(http.ErrAbortHandler)
}

// send sends the body: events one by one, everything else as fast as it goes.
func send(w http.ResponseWriter, p plan, r *http.Request, body io.Reader) error {
	if p.answer.form != eventForm {
		_, err := io.Copy(w, body)
		return err
	}
	for range p.answer.size / int64(eventSize) {
		if _, err := io.CopyN(w, body, int64(eventSize)); err != nil {
			return err
		}
		if err := http.NewResponseController(w).Flush(); err != nil {
			return err
		}
		pause(r.Context(), p.pace)
	}
	return nil
}
