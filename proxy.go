package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
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
	cfg        *config
	upstream   *upstream
	tailnet    *tailnet // nil with -local
	metrics    *metrics
	log        *slog.Logger
	started    time.Time
	places     *gate // requests at once
	bodyBudget *gate // bytes of buffered bodies

	draining  context.Context // done, with errShuttingDown, once the process is told to stop
	stopping  context.CancelCauseFunc
	active    atomic.Int64 // requests that have arrived and are not finished, queued ones included
	drained   chan struct{}
	drainOnce sync.Once
	logging   sync.WaitGroup // log lines that wait for a caller's identity
}

// newProxy returns a proxy that is ready to serve. tn is nil where there is no tailnet.
func newProxy(cfg *config, tn *tailnet, log *slog.Logger) *proxy {
	p := &proxy{
		cfg:        cfg,
		upstream:   newUpstream(cfg),
		tailnet:    tn,
		log:        log,
		started:    time.Now(),
		places:     newGate(cfg.maxConnections),
		bodyBudget: newGate(cfg.bodyMemory),
		metrics:    newMetrics(),
		drained:    make(chan struct{}),
	}
	p.draining, p.stopping = context.WithCancelCause(context.Background())
	return p
}

// exchange is one proxied request and its answer, as far as they have come. Its parts are values: one
// allocation makes them all. A timer and what else can be used again are its connection's.
type exchange struct {
	w      http.ResponseWriter
	r      *http.Request
	conn   *clientConn
	id     [1]string // an array, as a header's values are a slice
	target target
	url    url.URL // upstream
	start  time.Time
	cancel context.CancelCauseFunc // ends the attempt whose answer is being streamed

	body     requestBody
	guard    uploadGuard // the steps that the connection's alarm is set for, in turn
	waiting  headerWait
	silence  silence
	out      clientWriter
	repeated bool // once is what a connection failure gets

	// For the log line.
	status            int // sent to the client; statusClientGone if it left
	answered          bool
	attempts          int
	ttfb              time.Duration
	bytesIn, bytesOut int64
	upstreamRequestID string
	latency           time.Duration
	caller            identity
	err               error
}

// requestIDHeader names a request in the answer, for the log.
const requestIDHeader = "X-Proxy-Request-Id"

// ServeHTTP implements http.Handler. It matches the path that the client wrote: a mux would clean
// paths and redirect.
func (p *proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.ProtoMajor != 1 {
		// The preface of HTTP/2 is the one request of another version that net/http leaves to its handlers.
		leaveUnread(w)
		http.Error(w, "505 HTTP Version Not Supported", http.StatusHTTPVersionNotSupported)
		return
	}
	x := &exchange{w: w, r: r, conn: connOf(r), id: [1]string{newRequestID()}, target: requestTarget(r), start: time.Now()}
	w.Header()[requestIDHeader] = x.id[:]
	if x.conn != nil {
		x.conn.SetReadDeadline(time.Time{}) // ReadTimeout is for requests that net/http itself answers
	}
	if len(r.TransferEncoding) > 0 || !r.ProtoAtLeast(1, 1) {
		// net/http accepts Content-Length beside Transfer-Encoding, and takes no notice of the latter in HTTP/1.0; the
		// connection must then be closed after the answer (RFC 9112, 6.1), and which it was can't be told here.
		w.Header().Set("Connection", "close")
	}
	switch x.target.path {
	case "/health":
		serveOwn(w, r, p.serveHealth)
	case "/livez":
		serveOwn(w, r, p.serveLive)
	case "/metrics":
		serveOwn(w, r, p.serveMetrics)
	default:
		p.serve(x)
	}
}

// serve relays x and accounts for it, whatever happens.
func (p *proxy) serve(x *exchange) {
	p.active.Add(1)
	defer p.depart()
	x.conn.exchange = x
	defer func() {
		x.conn.alarm.stop()
		x.conn.exchange = nil
	}()
	defer func() {
		if v := recover(); v != nil {
			x.err = errInternal(fmt.Errorf("panic: %v", v))
			p.log.Error("panic in a request: this is a bug, please report it", "request_id", x.id[0], "stack", string(debug.Stack()))
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
	if err := p.waitInLine(x, p.places, 1); err != nil {
		return err
	}
	defer p.places.release(1)

	body, err := p.readBody(x)
	if err != nil {
		return err
	}
	if body != nil {
		defer body.finish()
	}
	resp, err := p.send(x, body)
	if err != nil {
		return err
	}
	defer x.cancel(nil)
	x.r.Header, resp.Request = nil, nil // sent, and of no use to anybody: 2.6 KB of the 39 that a stream holds
	defer resp.Body.Close()
	if body != nil {
		body.finish()
	}
	return p.stream(x, resp)
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
	return p.tailnet.admit(x.r.Context(), x.conn, p.cfg.requireTailnet)
}

// waitInLine takes n units of g for x. It gives up when the client leaves or the process is told to stop.
func (p *proxy) waitInLine(x *exchange, g *gate, n int64) error {
	if g.tryAcquire(n) {
		return nil
	}
	ctx, cancel := context.WithCancelCause(x.r.Context())
	defer cancel(nil)
	defer context.AfterFunc(p.draining, func() { cancel(errShuttingDown) })()
	if x.r.ContentLength != 0 && x.conn != nil {
		defer watchHangup(x.conn.Conn, func() { cancel(errClientGone) })()
	}
	if g.acquire(ctx, n) != nil {
		return departure(ctx)
	}
	return nil
}

// stream passes the upstream's answer to the client as it arrives. Only silence ends it.
func (p *proxy) stream(x *exchange, resp *http.Response) error {
	x.answered, x.status = true, resp.StatusCode
	header := x.w.Header()
	id := header[requestIDHeader]
	copyResponseHeader(header, resp.Header)
	header[requestIDHeader] = id
	for name := range resp.Trailer {
		header.Add("Trailer", name)
		header.Del("Content-Length") // HTTP/1.1 has trailers only after chunks
	}
	x.out = clientWriter{x: x, control: http.NewResponseController(x.w), timeout: p.cfg.timeout}
	if err := x.out.begin(resp); err != nil {
		return err
	}
	x.silence.limit, x.silence.cancel, x.silence.start = p.cfg.timeout, x.cancel, time.Now()
	x.conn.alarm.set(&x.silence, p.cfg.timeout)
	buf := eventBuffers.Get().(*[]byte)
	defer func() { buffersOf(*buf).Put(buf) }()
	for {
		n, err := x.silence.read(resp.Body, *buf)
		if n > 0 {
			if err := x.out.write((*buf)[:n]); err != nil {
				return err
			}
		}
		buf = refit(buf, n)
		switch gone := x.r.Context().Err() != nil; {
		case gone && x.out.whole():
			return nil
		case gone: // before io.EOF: an upstream that sees its stream cancelled may end it as if it were complete
			return departure(x.r.Context())
		case err != nil && !x.conn.alarm.clear():
			return errResponseRead(fmt.Errorf("%w for %v", errSilence, p.cfg.timeout))
		case err == io.EOF:
			x.conn.writeDeadline.extend(x.conn, p.cfg.timeout) // for what net/http sends at the end
			for name, values := range resp.Trailer {
				header[http.TrailerPrefix+name] = values
			}
			return nil
		case err != nil:
			return errResponseRead(err)
		}
	}
}

// Answers are copied through buffers that fit an event or a few, since each stream holds one for as long as it
// lasts, and through large ones as long as more than that comes at a time.
const (
	eventBuffer = 2 << 10
	bulkBuffer  = 16 << 10
)

var (
	eventBuffers = sync.Pool{New: func() any { b := make([]byte, eventBuffer); return &b }}
	bulkBuffers  = sync.Pool{New: func() any { b := make([]byte, bulkBuffer); return &b }}
)

// buffersOf returns the pool that buf belongs to.
func buffersOf(buf []byte) *sync.Pool {
	if len(buf) == eventBuffer {
		return &eventBuffers
	}
	return &bulkBuffers
}

// refit returns the buffer for the next read after one that brought n bytes.
func refit(buf *[]byte, n int) *[]byte {
	now, next := buffersOf(*buf), &bulkBuffers
	if n < eventBuffer {
		next = &eventBuffers
	}
	if next == now {
		return buf
	}
	now.Put(buf)
	return next.Get().(*[]byte)
}

// clientWriter writes an answer to the client, each chunk as it comes, under a rolling deadline.
type clientWriter struct {
	x       *exchange
	control *http.ResponseController
	timeout time.Duration // of a client that reads nothing
	missing int64         // bytes of the declared length that were not written yet; negative: not declared
}

// begin sends the headers: at once if nobody can know when something follows them, as with event streams.
// With a declared length they go together with the first bytes, which saves a tenth of a small request's time.
func (c *clientWriter) begin(resp *http.Response) error {
	c.missing = resp.ContentLength
	c.x.conn.writeDeadline.begin()
	c.x.conn.writeDeadline.extend(c.x.conn, c.timeout)
	c.x.w.WriteHeader(resp.StatusCode)
	if c.missing >= 0 || resp.Body == http.NoBody {
		return nil
	}
	return writeFailed(c.control.Flush())
}

// write sends one chunk. The last one of a declared length is left to net/http to flush, together
// with whatever ends the answer.
func (c *clientWriter) write(chunk []byte) error {
	c.x.conn.writeDeadline.extend(c.x.conn, c.timeout)
	n, err := c.x.w.Write(chunk)
	c.x.bytesOut += int64(n)
	c.missing -= int64(n)
	if err == nil && c.missing != 0 {
		err = c.control.Flush()
	}
	return writeFailed(err)
}

// whole reports whether all of a declared length was written: a client may leave then, before the upstream has said
// that this was the end.
func (c *clientWriter) whole() bool { return c.missing == 0 && c.x.bytesOut > 0 }

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

// finish answers with x's failure if nothing was sent yet, then counts and logs x.
func (p *proxy) finish(x *exchange) {
	f := asFailure(x.err)
	switch {
	case f == nil:
	case f.status == statusClientGone:
		x.status = statusClientGone
	case !x.answered:
		x.status = f.status
		x.w.Header()["Request-Id"] = x.id[:] // the only place where some SDKs look
		if x.attempts == 0 && x.r.ContentLength != 0 {
			leaveUnread(x.w)
		}
		f.writeTo(x.w, x.id[0])
	}
	if f != nil && f.errorType != "" {
		p.metrics.upstreamError(f.errorType)
	}
	x.latency = time.Since(x.start)
	p.metrics.requestDone(x.status, x.r.Method, x.latency)
	p.logDone(x)
	if f != nil && (x.answered || x.status == statusClientGone) {
		if x.answered && x.bytesOut == 0 {
			x.out.control.Flush() // the headers, which may still wait for the first bytes
		}
		panic(http.ErrAbortHandler) // a broken answer must look broken
	}
}

// logDone writes x's log line: at once, or, while tailscaled is still being asked who the caller
// is, as soon as it says. The caller's next request does not wait for that.
func (p *proxy) logDone(x *exchange) {
	if !p.log.Enabled(context.Background(), slog.LevelInfo) {
		return
	}
	ended := time.Now()
	caller, pending := x.conn.caller()
	if pending == nil {
		x.caller = caller
		p.logLine(x, ended)
		return
	}
	p.logging.Go(func() {
		<-pending
		x.caller, _ = x.conn.caller()
		p.logLine(x, ended)
	})
}

// logLine writes x's log line, as of the time it ended.
func (p *proxy) logLine(x *exchange, ended time.Time) {
	record := slog.NewRecord(ended, slog.LevelInfo, "request completed", 0)
	record.AddAttrs(slog.Any("", x))
	p.log.Handler().Handle(context.Background(), record)
}

// appendFields implements [fieldAppender], with what a log line tells of x.
func (x *exchange) appendFields(b []byte) []byte {
	b = appendString(b, "request_id", x.id[0])
	b = appendString(b, "method", x.r.Method)
	b = appendString(b, "path", x.target.path)
	b = appendInt(b, "status", int64(x.status))
	b = appendInt(b, "latency_ms", x.latency.Milliseconds())
	b = appendInt(b, "ttfb_ms", x.ttfb.Milliseconds())
	b = appendInt(b, "attempts", int64(x.attempts))
	b = appendInt(b, "bytes_in", x.bytesIn)
	b = appendInt(b, "bytes_out", x.bytesOut)
	b = appendString(b, "upstream_request_id", x.upstreamRequestID)
	b = appendString(b, "tailnet_node", x.caller.node)
	b = appendString(b, "tailnet_user", x.caller.user)
	if x.err != nil {
		b = appendString(b, "error", describe(x.err))
	}
	return b
}

// depart counts x's end; the last one to leave after the signal ends the drain.
func (p *proxy) depart() {
	if p.active.Add(-1) == 0 && p.draining.Err() != nil {
		p.drainOnce.Do(func() { close(p.drained) })
	}
}

// drain refuses new requests, sends queued ones away and waits up to timeout for the others, or
// until ctx ends. It returns how many are left.
func (p *proxy) drain(ctx context.Context, timeout time.Duration) (remaining int64) {
	p.stopping(errShuttingDown)
	if p.active.Load() > 0 {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		select {
		case <-p.drained:
		case <-ctx.Done():
		}
	}
	return p.active.Load()
}

// newRequestID returns "req_" and a random UUID (RFC 9562, version 4).
func newRequestID() string {
	var u [16]byte
	rand.Read(u[:])
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	id := make([]byte, 0, len("req_")+36)
	id = append(id, "req_"...)
	for i, b := range u {
		if i == 4 || i == 6 || i == 8 || i == 10 {
			id = append(id, '-')
		}
		id = hex.AppendEncode(id, []byte{b})
	}
	return string(id)
}
