package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// An upload that brings less than slowUploadBytes in slowUploadWindow is given up while others wait
// for the memory that it holds.
const (
	slowUploadWindow = 10 * time.Second
	slowUploadBytes  = 10 * 8 << 10
)

// segmentSize bounds the pieces in which a body is buffered: nothing is copied while it grows, and full pieces
// are used again, since fresh memory costs as much as all else that is done for a large body.
const segmentSize = 256 << 10

var fullSegments = sync.Pool{New: func() any { return new([segmentSize]byte) }}

// newSegment returns an empty piece with room for n bytes, segmentSize at most.
func newSegment(n int64) []byte {
	if n == segmentSize {
		return fullSegments.Get().(*[segmentSize]byte)[:0]
	}
	return make([]byte, 0, n)
}

// requestBody is a request body in memory, so that an attempt can be repeated. Its bytes count
// against the budget from reservation until nothing can need them any more.
type requestBody struct {
	segments [][]byte
	first    [1][]byte  // the room for one, which is enough for most
	attempt  bodyReader // the room for the first attempt's
	size     int64
	budget   *gate

	mu       sync.Mutex
	reserved int64
	reader   *bodyReader // the newest, the only one that may be open
	done     bool        // no further attempt will start
}

// open returns a reader of the whole body for one attempt. It closes the one before, of an attempt that has failed:
// net/http forgets to close a body that it has asked for when the connection that it was for is gone.
func (b *requestBody) open() *bodyReader {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reader == nil {
		b.reader = &b.attempt
	} else {
		b.reader.closed = true
		b.reader = new(bodyReader)
	}
	b.reader.body, b.reader.rest = b, b.segments
	return b.reader
}

// begun reports whether the newest attempt has read any of the body.
func (b *requestBody) begun() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.reader.begun
}

// abandon says that the newest attempt has failed.
func (b *requestBody) abandon() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.reader != nil {
		b.reader.closed = true
	}
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
	if b.done && (b.reader == nil || b.reader.closed) {
		for i, segment := range b.segments {
			if cap(segment) == segmentSize {
				fullSegments.Put((*[segmentSize]byte)(segment[:segmentSize]))
			}
			b.segments[i] = nil
		}
		needed, b.segments = 0, nil
	}
	if excess := b.reserved - needed; excess > 0 {
		b.reserved = needed
		b.budget.release(excess)
	}
}

// bodyReader reads a requestBody for one attempt. net/http may close it in the middle of a Read: body.mu keeps
// the segments until that is over.
type bodyReader struct {
	body   *requestBody
	rest   [][]byte // segments not yet read to their end
	offset int      // read so far of the first of them
	begun  bool
	closed bool
}

// Read implements io.Reader. With the last byte the reader is done: over HTTP/2, net/http closes it
// only at the end of the answer.
func (r *bodyReader) Read(p []byte) (n int, err error) {
	r.body.mu.Lock()
	defer r.body.mu.Unlock()
	r.begun = true
	if r.closed && len(r.rest) > 0 {
		return 0, io.ErrClosedPipe
	}
	for len(r.rest) > 0 && n < len(p) {
		copied := copy(p[n:], r.rest[0][r.offset:])
		n += copied
		r.offset += copied
		if r.offset == len(r.rest[0]) {
			r.rest, r.offset = r.rest[1:], 0
		}
	}
	if len(r.rest) == 0 {
		r.close()
		return n, io.EOF
	}
	return n, nil
}

// Close implements io.Closer.
func (r *bodyReader) Close() error {
	r.body.mu.Lock()
	defer r.body.mu.Unlock()
	r.close()
	return nil
}

// close lets go of the segments. The caller holds body.mu.
func (r *bodyReader) close() {
	r.closed = true
	r.body.settle()
}

// readBody reserves memory for the request's body and reads it: nil if there is none. It waits in
// line for the memory.
func (p *proxy) readBody(x *exchange) (*requestBody, error) {
	reserve := x.r.ContentLength
	if reserve == 0 {
		return nil, nil
	}
	if reserve < 0 { // chunked: nobody knows, so as much as is allowed
		reserve = p.cfg.maxBody
	}
	if err := p.waitInLine(x, p.bodyBudget, reserve); err != nil {
		return nil, err
	}
	body := &x.body
	body.budget, body.reserved, body.segments = p.bodyBudget, reserve, body.first[:0]
	whole := false
	defer func() {
		if !whole { // a panic included
			body.finish()
		}
	}()
	err := p.upload(x, body)
	x.bytesIn = body.size
	if err != nil {
		return nil, err
	}
	whole = true
	body.mu.Lock()
	defer body.mu.Unlock()
	body.settle()
	return body, nil
}

// upload reads the request's body into b.
func (p *proxy) upload(x *exchange, b *requestBody) error {
	guard := &x.guard
	x.conn.alarm.set(guard, guard.begin(x.conn, p.bodyBudget, p.cfg.timeout))
	var segment []byte
	var unwatch func() bool
	for {
		if len(segment) == cap(segment) {
			room := max(x.r.ContentLength-b.size, 1)
			if x.r.ContentLength < 0 {
				// One byte more than is allowed, to see whether there is one.
				room = min(p.cfg.maxBody+1-b.size, max(b.size, bytes.MinRead))
			}
			segment = newSegment(min(room, segmentSize))
			b.segments = append(b.segments, nil)
		}
		n, err := x.r.Body.Read(segment[len(segment):cap(segment)])
		guard.progress(n)
		segment = segment[:len(segment)+n]
		b.segments[len(b.segments)-1] = segment
		b.size += int64(n)
		if b.size > p.cfg.maxBody {
			x.conn.alarm.clear()
			return errBodyTooLarge(p.cfg.maxBody)
		}
		// net/http reports io.EOF together with the last byte of a declared length: no second
		// segment is made just to learn that nothing follows.
		if err != nil {
			x.conn.alarm.clear()
			return guard.verdict(x.r.Context(), err)
		}
		if unwatch == nil { // not the first read: it may wait, when the process is about to end too
			unwatch = context.AfterFunc(x.r.Context(), guard.interrupt)
			defer unwatch()
		}
	}
}

// uploadGuard is the step of receiving a body. It ends uploads that fall silent and, while others wait
// for memory, slow ones.
type uploadGuard struct {
	conn    net.Conn
	budget  *gate
	timeout time.Duration // of silence
	start   time.Time

	received atomic.Int64 // bytes so far
	latest   atomic.Int64 // when the latest of them came, after start

	windowEnd time.Time
	counted   int64    // received at the beginning of the window
	failure   *failure // why the upload was ended; nil if it wasn't
}

// begin prepares the guard for an upload over conn and returns when to look first.
func (g *uploadGuard) begin(conn net.Conn, budget *gate, timeout time.Duration) time.Duration {
	g.conn, g.budget, g.timeout, g.start = conn, budget, timeout, time.Now()
	g.windowEnd = g.start.Add(slowUploadWindow)
	return min(slowUploadWindow, timeout)
}

// progress says that n bytes have come.
func (g *uploadGuard) progress(n int) {
	g.received.Add(int64(n))
	g.latest.Store(int64(time.Since(g.start)))
}

func (g *uploadGuard) overdue(now time.Time) time.Duration {
	silentAt := g.start.Add(time.Duration(g.latest.Load()) + g.timeout)
	if !now.Before(g.windowEnd) {
		received := g.received.Load()
		if received-g.counted < slowUploadBytes && g.budget.contended() {
			g.failure = errSlowUpload
		}
		g.counted, g.windowEnd = received, now.Add(slowUploadWindow)
	}
	if !now.Before(silentAt) {
		g.failure = errSilentUpload
	}
	if g.failure != nil {
		g.interrupt()
		return 0
	}
	return min(g.windowEnd.Sub(now), silentAt.Sub(now))
}

// interrupt ends the read that waits.
func (g *uploadGuard) interrupt() { g.conn.SetReadDeadline(time.Unix(1, 0)) }

// verdict says what the end of the upload means: nil for io.EOF.
func (g *uploadGuard) verdict(ctx context.Context, err error) error {
	_, network := errors.AsType[net.Error](err)
	switch {
	case err == io.EOF:
		return nil
	case g.failure != nil:
		return g.failure
	case errors.Is(err, io.ErrUnexpectedEOF), network, ctx.Err() != nil:
		return departure(ctx)
	default:
		return errMalformedBody
	}
}
