package soak

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

const (
	authorization = "Bearer not-a-token" // of every request
	// numberHeader has the number of every request. In answers of unknown length it is a trailer.
	numberHeader = "X-Soak-Number"
)

// upstreamID is how the Request-Id of an answer begins, which its attempt follows.
func upstreamID(number int) string { return fmt.Sprintf("up_%d_", number) }

// ServeHTTP is the upstream: it does what the request's plan says. Where it panics, net/http resets the stream or connection, in
// place of ending the answer as if it were whole.
func (l *lane) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	number, attempt := numberOf(r.URL.Path), 0
	p := newPlan(l.seed, number)
	l.note(number, func(x *exchange) {
		x.attempts++
		attempt = x.attempts
	})
	w.Header().Set("Request-Id", upstreamID(number)+strconv.Itoa(attempt))
	if h := r.Header; r.Method != p.method || h.Get("Authorization") != authorization ||
		h.Get("Anthropic-Beta") != fakeanthropic.OAuthBeta || h.Get(numberHeader) != strconv.Itoa(number) {
		l.wrong("%v: it reached the upstream as %s with the headers %v", p, r.Method, h)
	}
	if !p.early {
		body, broken := io.ReadAll(r.Body)
		if err := p.request.check(body, broken == nil); err != nil {
			l.wrong("%v: it reached the upstream with a wrong body: %v", p, err)
			w.WriteHeader(http.StatusUnprocessableEntity) // which no plan expects
			return
		}
		if broken != nil {
			panic(http.ErrAbortHandler) // the proxy has given this attempt up
		}
	}
	if p.refuses {
		if conn, _, err := http.NewResponseController(w).Hijack(); err == nil { // HTTP/1.1
			p.close(conn.(*tls.Conn).NetConn())
		}
		panic(http.ErrAbortHandler)
	}
	if attempt <= p.silent {
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	}
	pause(r.Context(), p.delay)
	p.write(r.Context(), w)
}

// close ends a connection in the plan's way.
func (p plan) close(conn net.Conn) {
	if p.reset {
		_ = conn.(*net.TCPConn).SetLinger(0) // fails only on a connection that is closed
	}
	_ = conn.Close() // nothing depends on it any more
}

// pause waits for d, unless the proxy gives up before.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
		panic(http.ErrAbortHandler)
	}
}

// header is that of p's answer.
func (p plan) header() http.Header {
	h := p.form.Clone()
	if p.declared {
		h.Set("Content-Length", strconv.FormatInt(p.answer.size, 10))
		h.Set(numberHeader, strconv.Itoa(p.number))
	} else {
		h.Set("Trailer", numberHeader)
	}
	return h
}

// write sends the answer, events one by one, all else as fast as it goes.
func (p plan) write(ctx context.Context, w http.ResponseWriter) {
	maps.Copy(w.Header(), p.header())
	w.WriteHeader(p.status)
	if p.method == http.MethodHead {
		return
	}
	for piece := range slices.Chunk(p.answer.bytes()[:p.answer.sent], p.piece) {
		w.Write(piece) // Flush tells of a failure
		if http.NewResponseController(w).Flush() != nil {
			panic(http.ErrAbortHandler) // the proxy has left
		}
		pause(ctx, p.pace)
	}
	if p.stalls {
		<-ctx.Done()
	}
	if p.answer.sent < p.answer.size {
		panic(http.ErrAbortHandler)
	}
	if !p.declared {
		w.Header().Set(numberHeader, strconv.Itoa(p.number))
	}
}
