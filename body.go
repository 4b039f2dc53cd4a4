package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
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

// maxSegment bounds the pieces in which a body of undeclared length is buffered: nothing is copied
// while it grows, and no more than that is reserved in vain.
const maxSegment = 256 << 10

// requestBody is a request body in memory, so that an attempt can be repeated. Its bytes count
// against the budget from reservation until nothing can need them any more.
type requestBody struct {
	segments [][]byte // one, if the length was declared
	size     int64
	budget   *gate

	mu       sync.Mutex
	reserved int64
	readers  int  // attempts that still read the segments
	done     bool // no further attempt will start
}

// open returns a reader of the whole body for one attempt. Closing it more than once is fine.
func (b *requestBody) open() *bodyReader {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers++
	return &bodyReader{body: b, rest: b.segments}
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
		needed, b.segments = 0, nil
	}
	if excess := b.reserved - needed; excess > 0 {
		b.reserved = needed
		b.budget.release(excess)
	}
}

// bodyReader reads a requestBody for one attempt.
type bodyReader struct {
	body   *requestBody
	rest   [][]byte // segments not yet read to their end
	offset int      // read so far of the first of them
	begun  atomic.Bool
	done   sync.Once
}

// Read implements io.Reader. With the last byte the reader is done: over HTTP/2, net/http closes it
// only at the end of the answer.
func (r *bodyReader) Read(p []byte) (n int, err error) {
	r.begun.Store(true)
	for len(r.rest) > 0 && n < len(p) {
		copied := copy(p[n:], r.rest[0][r.offset:])
		n += copied
		r.offset += copied
		if r.offset == len(r.rest[0]) {
			r.rest, r.offset = r.rest[1:], 0
		}
	}
	if len(r.rest) == 0 {
		r.Close()
		return n, io.EOF
	}
	return n, nil
}

// Close implements io.Closer.
func (r *bodyReader) Close() error {
	r.done.Do(func() {
		r.body.mu.Lock()
		defer r.body.mu.Unlock()
		r.body.readers--
		r.body.settle()
	})
	return nil
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
	body := &requestBody{budget: p.bodyBudget, reserved: reserve}
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
	guard := p.guardUpload(x)
	defer guard.stop()
	var segment []byte
	for {
		if len(segment) == cap(segment) {
			// One byte more than is allowed, to see whether there is one.
			room := p.cfg.maxBody + 1 - b.size
			if declared := x.r.ContentLength; declared >= 0 && b.size == 0 {
				room = min(room, declared)
			} else {
				room = min(room, max(b.size, bytes.MinRead), maxSegment)
			}
			segment = make([]byte, 0, room)
			b.segments = append(b.segments, nil)
		}
		guard.extend(b.size)
		n, err := x.r.Body.Read(segment[len(segment):cap(segment)])
		segment = segment[:len(segment)+n]
		b.segments[len(b.segments)-1] = segment
		b.size += int64(n)
		if b.size > p.cfg.maxBody {
			return errBodyTooLarge(p.cfg.maxBody)
		}
		// net/http reports io.EOF together with the last byte of a declared length: no second
		// segment is made just to learn that nothing follows.
		if err != nil {
			return guard.verdict(x.r.Context(), err)
		}
	}
}

// uploadGuard bounds the silence within one upload and, while others wait for memory, its slowness.
type uploadGuard struct {
	control *http.ResponseController
	budget  *gate

	mu       sync.Mutex
	silence  rollingDeadline
	received int64 // bytes so far
	counted  int64 // received at the beginning of the present window
	slow     bool  // given up for slowness
	stopped  bool
	window   *time.Timer
}

// guardUpload starts watching x's upload.
func (p *proxy) guardUpload(x *exchange) *uploadGuard {
	g := &uploadGuard{control: http.NewResponseController(x.w), budget: p.bodyBudget}
	g.silence = rollingDeadline{set: g.control.SetReadDeadline, timeout: p.cfg.timeout}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.window = time.AfterFunc(slowUploadWindow, g.endWindow)
	return g
}

// endWindow gives the upload up if it was slow in the window that ends and others wait.
func (g *uploadGuard) endWindow() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return
	}
	if g.received-g.counted < slowUploadBytes && g.budget.contended() {
		g.slow = true
		g.control.SetReadDeadline(time.Unix(1, 0)) // ends the read that waits
		return
	}
	g.counted = g.received
	g.window.Reset(slowUploadWindow)
}

// extend allows for one more read after received bytes.
func (g *uploadGuard) extend(received int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.received = received
	if !g.slow {
		g.silence.extend()
	}
}

// stop ends the watch. The connection is left without a read deadline, since net/http reads on to
// learn of the client's departure.
func (g *uploadGuard) stop() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.stopped = true
	g.window.Stop()
	g.control.SetReadDeadline(time.Time{})
}

// verdict says what the end of the upload means: nil for io.EOF.
func (g *uploadGuard) verdict(ctx context.Context, err error) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, network := errors.AsType[net.Error](err)
	switch {
	case err == io.EOF:
		return nil
	case g.slow:
		return errSlowUpload
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errSilentUpload
	case errors.Is(err, io.ErrUnexpectedEOF), network, ctx.Err() != nil:
		return departure(ctx)
	default:
		return errMalformedBody
	}
}
