package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// An upload that brings less than slowUploadBytes in slowUploadWindow is given up while others wait for memory or for a
// place.
const (
	slowUploadWindow = 10 * time.Second
	slowUploadBytes  = 10 * 8 << 10
)

// chunkStep is how much of a chunked body is read at a time, in bytes.
const chunkStep = 16 << 10

// bodyReader reads request bodies into memory, so that an attempt can be repeated.
type bodyReader struct {
	budget  *gate         // bytes of all bodies
	largest int64         // bytes of one
	timeout time.Duration // the longest silence of an upload
	crowded func() bool   // somebody waits for what an upload holds
}

// reservation returns how many bytes of the budget r's body needs; 0 if it has none.
func (b *bodyReader) reservation(r *http.Request) int64 {
	if r.ContentLength < 0 { // chunked: nobody knows, so as much as is allowed
		return b.largest
	}
	return r.ContentLength
}

// read reads r's body, which comes over conn, and takes over what was reserved for it. The body is returned with an error
// too, for its size; it is finished then.
func (b *bodyReader) read(r *http.Request, conn net.Conn) (body *requestBody, err error) {
	body = &requestBody{budget: b.budget, reserved: b.reservation(r)}
	defer func() {
		if err != nil || body.content == nil { // or panic
			body.finish()
		}
	}()
	guard := newUploadGuard(conn, b)
	defer guard.stop()
	content := newContent(max(r.ContentLength, bytes.MinRead))
	var unwatch func() bool
	for {
		if len(content) == cap(content) {
			// One byte more than is allowed, to see whether there is one.
			content = slices.Grow(content, int(min(int64(len(content)), b.largest+1-int64(len(content)))))
		}
		room := cap(content)
		if r.ContentLength < 0 { // net/http fills what it gets from a chunk: not so much that progress can't be seen
			room = min(room, len(content)+chunkStep, int(b.largest)+1)
		}
		n, err := r.Body.Read(content[len(content):room])
		guard.progress(n)
		content = content[:len(content)+n]
		body.size = int64(len(content))
		// net/http reports io.EOF together with the last byte of a declared length: nothing grows just to learn that
		// nothing follows.
		switch {
		case body.size > b.largest:
			return body, errBodyTooLarge(b.largest)
		case err == io.EOF:
			body.keep(content)
			return body, nil
		case err != nil:
			return body, guard.verdict(r.Context(), err)
		case unwatch == nil: // not before the first read: what has come is read, even if the process is about to end
			unwatch = context.AfterFunc(r.Context(), guard.interrupt)
			defer unwatch()
		}
	}
}

// largeContent is from where on memory for a body is used again, in bytes: fresh memory costs a sixth of all that is
// done for a large body.
const largeContent = 256 << 10

var largeContents sync.Pool // of *[]byte

// newContent returns memory for n bytes, of length 0.
func newContent(n int64) []byte {
	if n >= largeContent {
		// Not much more than that: what is not needed is in no budget.
		if used, ok := largeContents.Get().(*[]byte); ok && n <= int64(cap(*used)) && int64(cap(*used)) <= n+n/4 {
			return (*used)[:0]
		}
	}
	return make([]byte, 0, n)
}

// requestBody is a request's body in memory. Its bytes count against the budget from their reservation until nothing can
// need them any more.
type requestBody struct {
	size   int64
	budget *gate

	mu       sync.Mutex
	content  []byte
	reserved int64
	readers  int  // that are open
	done     bool // no further one will be
}

// keep sets the content, which is complete.
func (b *requestBody) keep(content []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if cap(content) > len(content)+len(content)/4+bytes.MinRead { // chunked: it has grown by doubling
		content = bytes.Clone(content)
	}
	b.content = content
	b.settle()
}

// open returns a reader of the whole body for one attempt.
func (b *requestBody) open() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers++
	return &bodyCopy{body: b, rest: b.content}
}

// finish says that no further attempt will be made. The memory is given back as soon as the
// last attempt stops reading: an upstream may answer before it has read everything.
func (b *requestBody) finish() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done = true
	b.settle()
}

// settle shrinks the reservation to what is still needed. The caller holds b.mu.
func (b *requestBody) settle() {
	needed := b.size
	if b.done && b.readers == 0 {
		if used := b.content; cap(used) >= largeContent {
			largeContents.Put(&used)
		}
		needed, b.content = 0, nil
	}
	if excess := b.reserved - needed; excess > 0 {
		b.reserved = needed
		b.budget.release(excess)
	}
}

// bodyCopy is one attempt's reader of a requestBody. net/http may close it in the middle of a Read.
type bodyCopy struct {
	body   *requestBody
	rest   []byte
	closed bool
}

// Read implements io.Reader. With the last byte the reader is done: over HTTP/2, net/http closes it
// only at the end of the answer.
func (c *bodyCopy) Read(p []byte) (n int, err error) {
	c.body.mu.Lock()
	defer c.body.mu.Unlock()
	if c.closed && len(c.rest) > 0 {
		return 0, io.ErrClosedPipe
	}
	n = copy(p, c.rest)
	c.rest = c.rest[n:]
	if len(c.rest) == 0 {
		c.rest = nil
		c.close()
		return n, io.EOF
	}
	return n, nil
}

// Close implements io.Closer.
func (c *bodyCopy) Close() error {
	c.body.mu.Lock()
	defer c.body.mu.Unlock()
	c.close()
	return nil
}

// close is Close for a caller that holds body.mu.
func (c *bodyCopy) close() {
	if !c.closed {
		c.closed = true
		c.body.readers--
		c.body.settle()
	}
}

// uploadGuard ends an upload that falls silent and, while others wait, a slow one.
type uploadGuard struct {
	*watch
	conn     net.Conn
	limits   *bodyReader
	start    time.Time
	received atomic.Int64 // bytes so far
	latest   atomic.Int64 // when the latest of them came, after start

	windowEnd time.Time
	counted   int64                   // received at the beginning of the window
	failed    atomic.Pointer[failure] // why the upload was ended
}

// newUploadGuard begins to guard an upload over conn. It is to be stopped.
func newUploadGuard(conn net.Conn, limits *bodyReader) *uploadGuard {
	g := &uploadGuard{conn: conn, limits: limits, start: time.Now()}
	g.windowEnd = g.start.Add(slowUploadWindow)
	g.watch = startWatch(min(slowUploadWindow, limits.timeout), g.judge)
	return g
}

// progress says that n bytes have come.
func (g *uploadGuard) progress(n int) {
	g.received.Add(int64(n))
	g.latest.Store(int64(time.Since(g.start)))
}

// judge ends the upload if that is due, or returns when to look again.
func (g *uploadGuard) judge(now time.Time) time.Duration {
	silentAt := g.start.Add(time.Duration(g.latest.Load()) + g.limits.timeout)
	if !now.Before(g.windowEnd) {
		received := g.received.Load()
		if received-g.counted < slowUploadBytes && g.limits.crowded() {
			g.failed.Store(errSlowUpload)
		}
		g.counted, g.windowEnd = received, now.Add(slowUploadWindow)
	}
	if !now.Before(silentAt) {
		g.failed.Store(errSilentUpload)
	}
	if g.failed.Load() != nil {
		g.interrupt()
		return 0
	}
	return min(g.windowEnd.Sub(now), silentAt.Sub(now))
}

// interrupt ends the read that waits.
func (g *uploadGuard) interrupt() { g.conn.SetReadDeadline(time.Unix(1, 0)) }

// verdict says what the error that ended an upload means.
func (g *uploadGuard) verdict(ctx context.Context, err error) error {
	_, network := errors.AsType[net.Error](err)
	switch ended := g.failed.Load(); {
	case ended != nil:
		return ended
	case errors.Is(err, io.ErrUnexpectedEOF), network, ctx.Err() != nil:
		return departure(ctx)
	default:
		return errMalformedBody
	}
}
