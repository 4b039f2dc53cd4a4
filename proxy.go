package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
)

// proxy answers the endpoints of its own and forwards every other request upstream.
//
// A request's path is [proxy.relay]: check, admit, read, send, stream.
type proxy struct {
	cfg      *config
	own      endpoints
	upstream *upstream
	tailnet  *tailnet // nil with -local
	metrics  *metrics
	log      *slog.Logger
	places   *gate // requests at once
	bodies   *bodyLimits

	active     atomic.Int64    // requests that have arrived and are not finished, queued ones included
	draining   context.Context // done, with errShuttingDown, once the process is told to stop
	stop       context.CancelCauseFunc
	drained    context.Context // done once the last request has left after that
	setDrained context.CancelFunc
	logging    sync.WaitGroup  // log lines that wait for a caller's identity
	hurried    context.Context // done when they must not wait any longer
	hurry      context.CancelFunc
}

// newProxy returns a proxy that is ready to serve clients. tn is nil where there is no tailnet.
func newProxy(cfg *config, clients *clientListener, tn *tailnet, counters *metrics, log *slog.Logger) *proxy {
	p := &proxy{
		cfg:      cfg,
		own:      endpoints{metrics: counters, tailnet: tn, started: time.Now()},
		upstream: newUpstream(cfg),
		tailnet:  tn,
		metrics:  counters,
		log:      log,
		places:   newGate(cfg.maxConnections),
	}
	p.bodies = &bodyLimits{budget: newGate(cfg.bodyMemory), maxBody: cfg.maxBody, timeout: cfg.timeout, crowded: func() bool {
		return clients.full.Load() || p.places.contended() || p.bodies.budget.contended()
	}}
	p.draining, p.stop = context.WithCancelCause(context.Background())
	p.drained, p.setDrained = context.WithCancel(context.Background())
	p.hurried, p.hurry = context.WithCancel(context.Background())
	p.registerGauges(clients)
	return p
}

// registerGauges shows how busy the proxy is.
func (p *proxy) registerGauges(clients *clientListener) {
	gauge := func(name, help string, value func(places, inLine, bytes, inLineForBytes int64) int64) {
		p.metrics.gauge(name, help, func() (float64, bool) {
			places, inLine := p.places.load()
			bytes, inLineForBytes := p.bodies.budget.load()
			return float64(value(places, inLine, bytes, inLineForBytes)), true
		})
	}
	gauge("proxy_requests_in_flight", "Requests being proxied (at most max_connections).",
		func(places, _, _, inLineForBytes int64) int64 { return max(0, places-inLineForBytes) }) // who waits for memory has a place and has not begun; but a long upload has none any more, hence max
	gauge("proxy_requests_queued", "Requests that wait for a place (max_connections) or for body memory (body_memory_mb).",
		func(_, inLine, _, inLineForBytes int64) int64 { return inLine + inLineForBytes })
	gauge("proxy_buffered_body_bytes", "Memory reserved for request bodies (at most body_memory_mb).",
		func(_, _, bytes, _ int64) int64 { return bytes })
	gauge("proxy_connections", "Client connections.",
		func(_, _, _, _ int64) int64 { return int64(clients.connections()) })
	gauge("proxy_connections_limit", "Client connections that the memory limit carries: more wait in the kernel.",
		func(_, _, _, _ int64) int64 { return int64(clients.limit) })
}

// exchange is one proxied request and its answer, as far as they have come.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	conn   *clientConn
	id     string
	start  time.Time
	caller *lookup // nil with -local, and until somebody asks
	unread bool    // the body is still on its way
	placed atomic.Bool
	out    outgoing
	answer answerWriter
	buffer copyBuffer

	// For the log line.
	status            int // sent to the client; statusClientGone if it left
	ttfb              time.Duration
	bytesIn           int64
	upstreamRequestID string
	notes             []any // fields that only some requests have
	err               error
}

// ServeHTTP implements http.Handler. It matches the path that the client wrote: a mux would clean
// paths and redirect.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 {
		// The preface of HTTP/2 is the one request of another version that net/http leaves to its handlers.
		leaveUnread(w)
		http.Error(w, "505 HTTP Version Not Supported", http.StatusHTTPVersionNotSupported)
		return
	}
	x := &exchange{w: w, r: r, conn: connOf(r), id: newRequestID(), start: time.Now(), unread: r.ContentLength != 0, out: outgoing{Request: r, target: requestTarget(r)}}
	w.Header()[requestIDHeader] = []string{x.id}
	if session := r.Header.Get("X-Claude-Code-Session-Id"); isSessionID(session) {
		x.notes = append(x.notes, "session_id", session)
	}
	x.conn.SetReadDeadline(time.Time{}) // ReadTimeout is for requests that net/http itself answers
	if len(r.TransferEncoding) > 0 || !r.ProtoAtLeast(1, 1) {
		// RFC 9112, 6.1: after Content-Length beside Transfer-Encoding, or the latter in HTTP/1.0, the connection must be
		// closed. net/http accepts both without a word, so it is closed after every chunked request, and every one of
		// HTTP/1.0.
		w.Header().Set("Connection", "close")
	}
	if !p.own.serve(w, r, x.out.target.path) {
		p.serve(x)
	}
}

// serve relays x and accounts for it, whatever happens.
func (p *proxy) serve(x *exchange) {
	p.active.Add(1)
	defer p.requestEnded()
	defer func() {
		if v := recover(); v != nil {
			x.err = errInternal(fmt.Errorf("panic: %v", v))
			p.log.Error("panic in a request: this is a bug, please report it", "request_id", x.id, "stack", string(debug.Stack()))
		}
		p.finish(x)
	}()
	x.err = p.relay(x)
}

// relay takes x from its arrival to the last byte of its answer. Its error is the failure to
// answer with, or, if an answer has begun, the reason to cut it.
func (p *proxy) relay(x *exchange) error {
	if err := p.check(x); err != nil {
		return err
	}
	if err := p.takePlace(x); err != nil {
		return err
	}
	defer p.leavePlace(x)

	body, err := p.readBody(x)
	if err != nil {
		return err
	}
	if body != nil {
		defer body.finish()
	}
	if err := p.takePlace(x); err != nil { // unless it still has one
		return err
	}
	in, err := p.send(x, body)
	if err != nil {
		return err
	}
	defer in.cut(nil)
	defer in.Body.Close()
	if body != nil {
		body.finish()
	}
	return p.stream(x, in)
}

// check refuses what can be refused before the request takes a place.
func (p *proxy) check(x *exchange) error {
	switch {
	case p.draining.Err() != nil:
		return errShuttingDown
	case x.r.Method == http.MethodConnect:
		return errConnectMethod
	case x.r.ContentLength > p.cfg.maxBody:
		return errBodyTooLarge(p.cfg.maxBody)
	case p.tailnet == nil:
		return nil
	case !p.tailnet.wasConnected():
		return errNotConnected
	}
	lasts := time.Duration(math.MaxInt64)
	if p.cfg.capability != "" {
		lasts = grantLasts
	}
	x.caller = x.conn.caller(lasts, p.tailnet.whoIs)
	if !p.cfg.requireTailnet {
		return nil
	}
	return x.caller.require(x.r.Context(), p.cfg.capability)
}

// takePlace waits for a place for x, unless it has one.
func (p *proxy) takePlace(x *exchange) error {
	if x.placed.Load() {
		return nil
	}
	err := p.waitInLine(x, p.places, 1, false)
	x.placed.Store(err == nil)
	return err
}

// leavePlace gives x's place back, if it has one.
func (p *proxy) leavePlace(x *exchange) {
	if x.placed.Swap(false) {
		p.places.release(1)
	}
}

// waitInLine takes n units of g for x, first or last in line. It gives up when the client leaves or the process is told
// to stop.
func (p *proxy) waitInLine(x *exchange, g *gate, n int64, first bool) error {
	if !first && g.tryAcquire(n) {
		return nil
	}
	ctx, cancel := context.WithCancelCause(x.r.Context())
	defer cancel(nil)
	defer context.AfterFunc(p.draining, func() { cancel(errShuttingDown) })()
	if x.unread {
		defer watchHangup(x.conn.Conn, func() { cancel(errClientGone) })()
	}
	if g.acquire(ctx, n, first) != nil {
		return departure(ctx)
	}
	return nil
}

// readBody waits for the memory that x's body needs, and reads it: nil if there is none. While others wait, a long upload
// holds no place.
func (p *proxy) readBody(x *exchange) (*requestBody, error) {
	n := p.bodies.reservation(x.r)
	if n == 0 {
		return nil, nil
	}
	if err := p.waitInLine(x, p.bodies.budget, n, false); err != nil {
		return nil, err
	}
	if n >= largeBody {
		x.conn.widen()
	}
	body, err := p.bodies.read(bodySource{
		Request:    x.r,
		conn:       x.conn,
		reserve:    func(n int64) error { return p.waitInLine(x, p.bodies.budget, n, true) },
		yieldPlace: func() { p.leavePlace(x) },
	})
	x.unread, x.bytesIn = err != nil, body.size
	return body, err
}

// send sends x upstream, and returns the answer when its headers have come.
func (p *proxy) send(x *exchange, body *requestBody) (*incoming, error) {
	x.out.body = body
	x.out.again = func(cause error) {
		p.metrics.retries.Add(1)
		p.log.Debug("attempt failed, trying again", "request_id", x.id, "attempt", x.out.attempts, "error", describe(cause))
	}
	in, err := p.upstream.send(&x.out)
	if err != nil {
		return nil, err
	}
	x.ttfb = time.Since(x.start)
	p.metrics.firstByte(x.ttfb)
	x.upstreamRequestID = in.Header.Get("Request-Id")
	p.noteRateLimits(x, in.Header)
	x.r.Header, in.Request, x.out.body = nil, nil, nil // sent, and of no use to anybody: 2.6 KB of the 39 that a stream holds
	x.conn.forgetHeader()
	return in, nil
}

// noteRateLimits counts and logs what the answer says of its caller's rate limits: the 5-hour and 7-day windows of a plan.
func (p *proxy) noteRateLimits(x *exchange, h http.Header) {
	for _, field := range [...]struct{ key, header string }{
		{"ratelimit_status", "Anthropic-Ratelimit-Unified-Status"},
		{"ratelimit_5h", "Anthropic-Ratelimit-Unified-5h-Utilization"},
		{"ratelimit_7d", "Anthropic-Ratelimit-Unified-7d-Utilization"},
	} {
		if value := h.Get(field.header); value != "" {
			x.notes = append(x.notes, field.key, shorten(value))
		}
	}
	if status := h.Get("Anthropic-Ratelimit-Unified-Status"); status != "" {
		p.metrics.rateLimitStatus(status)
	}
}

// stream passes the upstream's answer to the client as it arrives, for as long as it keeps coming.
func (p *proxy) stream(x *exchange, in *incoming) error {
	x.status = in.StatusCode
	header, id := x.w.Header(), x.w.Header()[requestIDHeader]
	copyResponseHeader(header, in.Header)
	header[requestIDHeader] = id
	for name := range in.Trailer {
		if isForClient(name) {
			header.Add("Trailer", name)
		}
		header.Del("Content-Length") // HTTP/1.1 has trailers only after chunks
	}
	if x.conn.listener.full.Load() { // one after the other
		header.Set("Connection", "close")
	}
	out := &x.answer
	if err := out.begin(x, in.Response, p.cfg.timeout); err != nil {
		return err
	}
	from := boundSilence(in.Body, in.patience, func() { in.cut(errSilence) })
	defer from.stop()
	defer x.buffer.release()
	for n := 0; ; {
		var err error
		buf := x.buffer.next(n)
		if n, err = from.Read(buf); n > 0 {
			if err := out.write(buf[:n]); err != nil {
				return err
			}
		}
		switch gone := x.r.Context().Err() != nil; {
		case gone && out.whole():
			return nil
		case gone: // before io.EOF: an upstream that sees its stream cancelled may end it as if it were complete
			return departure(x.r.Context())
		case err == nil:
		case !from.stop():
			return errResponseRead(fmt.Errorf("%w for %v", errSilence, in.patience))
		case err == io.EOF:
			out.end(in.Trailer)
			return nil
		default:
			return errResponseRead(err)
		}
	}
}

// Answers are copied through a buffer that fits an event or a few, since each stream holds one for as long as it
// lasts, and through a large one while more than that comes at a time.
const (
	eventBuffer = 2 << 10
	bulkBuffer  = 32 << 10
)

var bulkBuffers = sync.Pool{New: func() any { return new([bulkBuffer]byte) }}

// copyBuffer is what an answer is copied through.
type copyBuffer struct {
	small [eventBuffer]byte
	large *[bulkBuffer]byte // nil while it is not needed
}

// next returns the buffer for the next read after one that brought n bytes.
func (b *copyBuffer) next(n int) []byte {
	switch {
	case n < eventBuffer:
		b.release()
		return b.small[:]
	case b.large == nil:
		b.large = bulkBuffers.Get().(*[bulkBuffer]byte)
	}
	return b.large[:]
}

// release gives the large buffer back.
func (b *copyBuffer) release() {
	if b.large != nil {
		bulkBuffers.Put(b.large)
		b.large = nil
	}
}

// answerWriter writes an answer to the client, each chunk as it comes, under a rolling deadline.
type answerWriter struct {
	w         http.ResponseWriter // nil until the answer has begun
	control   *http.ResponseController
	deadline  rollingDeadline // the answer's own: net/http takes it away after each
	remaining int64           // bytes of the declared length that were not written yet; negative: not declared
	written   int64
}

// begin sends the headers: at once if nobody can know when something follows them, as with event streams.
// With a declared length they go together with the first bytes, which saves a tenth of a small request's time.
func (a *answerWriter) begin(x *exchange, resp *http.Response, timeout time.Duration) error {
	*a = answerWriter{w: x.w, control: http.NewResponseController(x.w), deadline: rollingDeadline{conn: x.conn, timeout: timeout}, remaining: resp.ContentLength}
	a.deadline.extend()
	a.w.WriteHeader(resp.StatusCode)
	if a.remaining >= 0 || resp.Body == http.NoBody {
		return nil
	}
	return writeFailed(a.control.Flush())
}

// write sends one chunk. The last one of a declared length is left to net/http to flush, together
// with whatever ends the answer.
func (a *answerWriter) write(chunk []byte) error {
	a.deadline.extend()
	n, err := a.w.Write(chunk)
	a.written += int64(n)
	a.remaining -= int64(n)
	switch {
	case err == http.ErrBodyNotAllowed: // a 204 or 304 of an upstream that sends one all the same
		return nil
	case err == nil && a.remaining != 0:
		err = a.control.Flush()
	}
	return writeFailed(err)
}

// end leaves the end of the answer to net/http, with the trailers that came.
func (a *answerWriter) end(trailer http.Header) {
	a.deadline.extend()
	for name, values := range trailer {
		if isForClient(name) {
			a.w.Header()[http.TrailerPrefix+name] = values
		}
	}
}

// begun reports whether the client may have something of the answer.
func (a *answerWriter) begun() bool { return a.w != nil }

// whole reports whether all of a declared length was written: a client may leave then, before the upstream has said
// that this was the end.
func (a *answerWriter) whole() bool { return a.remaining == 0 && a.written > 0 }

// writeFailed says what an error of writing to the client means.
func writeFailed(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errSlowReader
	default:
		return errClientGone
	}
}

// finish answers with x's failure if nothing was sent yet, then counts and logs x. If the client has left, or an answer
// that has begun can't be completed, it panics at its end with http.ErrAbortHandler, which has net/http close the
// connection.
func (p *proxy) finish(x *exchange) {
	f := asFailure(x.err)
	switch {
	case f == nil:
	case f.status == statusClientGone:
		x.status = statusClientGone
	case !x.answer.begun():
		x.status = f.status
		x.w.Header()["Request-Id"] = []string{x.id} // the only place where some SDKs look
		if x.out.attempts == 0 && x.r.ContentLength != 0 {
			leaveUnread(x.w)
		}
		f.writeTo(x.w, x.id)
	}
	if f != nil && f.errorType != "" {
		p.metrics.upstreamError(f.errorType)
	}
	latency := time.Since(x.start)
	p.metrics.requestDone(x.status, x.r.Method, latency)
	p.logDone(x, latency)
	if f != nil && (x.answer.begun() || x.status == statusClientGone) {
		if x.answer.begun() {
			x.answer.control.Flush() // what has come goes out before the cut: headers wait for the first bytes, the last of them for an end
		}
		panic(http.ErrAbortHandler) // a broken answer must look broken
	}
}

// logDone writes x's log line: at once, or, while tailscaled is still being asked who the caller
// is, as soon as it says. The caller's next request does not wait for that.
func (p *proxy) logDone(x *exchange, latency time.Duration) {
	if !p.log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	if !x.caller.pending() {
		p.logLine(x, latency)
		return
	}
	p.logging.Go(func() {
		select {
		case <-x.caller.done:
		case <-p.hurried.Done():
		}
		p.logLine(x, latency)
	})
}

// logLine writes x's log line, as of the time when it ended.
func (p *proxy) logLine(x *exchange, latency time.Duration) {
	who := x.caller.answer()
	line := slog.NewRecord(x.start.Add(latency), slog.LevelInfo, "request completed", 0)
	line.Add("request_id", x.id, "method", shorten(x.r.Method), "path", shorten(x.out.target.path), "status", x.status,
		"latency_ms", latency.Milliseconds(), "ttfb_ms", x.ttfb.Milliseconds(), "attempts", x.out.attempts,
		"bytes_in", x.bytesIn, "bytes_out", x.answer.written, "upstream_request_id", x.upstreamRequestID,
		"tailnet_node", who.node, "tailnet_user", who.user)
	line.Add(x.notes...)
	if x.err != nil {
		line.Add("error", describe(x.err))
	}
	p.log.Handler().Handle(context.Background(), line)
}

// requestEnded counts a request's end; the last one after the signal ends the drain.
func (p *proxy) requestEnded() {
	if p.active.Add(-1) == 0 && p.draining.Err() != nil {
		p.setDrained()
	}
}

// drain refuses new requests, sends queued ones away and waits up to timeout for the others, or
// until ctx ends. It returns how many are left.
func (p *proxy) drain(ctx context.Context, timeout time.Duration) (remaining int64) {
	p.stop(errShuttingDown)
	if p.active.Load() > 0 {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		select {
		case <-p.drained.Done():
		case <-ctx.Done():
		}
	}
	return p.active.Load()
}
