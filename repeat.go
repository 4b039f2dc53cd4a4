package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
)

// A request may cost money each time that it is processed, and nobody can tell a lost answer from a lost request. So a
// connection failure is repeated once at most, and only if nothing of the request can have been processed: here stands
// what keeps net/http, which repeats some requests on its own, to that.

// isUnsent reports whether err proves that nothing of the request reached the upstream and another
// try may help. A dial that timed out has been tried for long enough, and a bad certificate stays bad.
func isUnsent(err error) bool {
	dial, unsent := errors.AsType[*dialError](err)
	_, certificate := errors.AsType[*tls.CertificateVerificationError](err)
	return unsent && !dial.Timeout() && !certificate
}

// repeat allows x one repetition after a connection failure. It is asked by send, and by net/http when
// it knows that nothing of the request was processed: not written to a connection that turned out to
// be closed, or refused by an HTTP/2 peer. net/http alone would go on for a minute.
func (x *exchange) repeat() bool {
	first := !x.repeated
	x.repeated = true
	return first
}

// repeatBody is a request's GetBody, by which net/http asks for a repetition.
func (x *exchange) repeatBody() (io.ReadCloser, error) {
	if x.body.begun() && !x.repeat() {
		return nil, errRefused
	}
	return x.body.open(), nil
}

// limitSends is the same for a request without a body over HTTP/2, which net/http sends again, when it was
// refused, without asking for a body: cancel ends the attempt before it is sent for the third time.
func limitSends(ctx context.Context, cancel context.CancelCauseFunc) context.Context {
	var sent atomic.Int32
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteHeaders: func() { sent.Add(1) },
		GotConn: func(httptrace.GotConnInfo) {
			if sent.Load() > 1 {
				cancel(errRefused)
			}
		},
	})
}

// repeatUnsent is the same for an idempotent request without a body over HTTP/1.1, which net/http repeats on
// its own when a used connection breaks, though the upstream may have read it. With a body it has to ask for
// that: so it gets one, which is empty. On the wire nothing changes: net/http looks before the headers go out.
func (x *exchange) repeatUnsent(ctx context.Context, req *http.Request) context.Context {
	var conn *upstreamConn
	var before int64
	req.Body = emptyBody{}
	req.GetBody = func() (io.ReadCloser, error) {
		if conn == nil || conn.written.Load() != before || !x.repeat() {
			return nil, errLost
		}
		return emptyBody{}, nil
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) {
			if conn = upstreamConnOf(info.Conn); conn != nil {
				before = conn.written.Load()
			}
		},
	})
}

// emptyBody is a body that net/http can't know to be empty.
type emptyBody struct{}

func (emptyBody) Read([]byte) (int, error) { return 0, io.EOF }
func (emptyBody) Close() error             { return nil }
