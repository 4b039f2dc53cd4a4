package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// A slow upload, which brings less than slowUploadBytes in slowUploadWindow, ends while anybody waits for a connection, a
// place or memory.
const (
	slowUploadWindow = 10 * time.Second
	slowUploadBytes  = 10 * 8 << 10
)

// A long upload, which at the pace of the latest paceWindow would need more than longUpload for its rest, gives up its place
// while anybody waits, and keeps only the memory that it has filled: it is charged as it comes.
const (
	paceWindow = time.Second
	longUpload = 20 * time.Second
)

// chunkStep is how much of a chunked body is read at a time, in bytes.
const chunkStep = 16 << 10

// bodyLimits bounds the memory and the time of request bodies, which are read into memory so that an attempt can be
// repeated.
type bodyLimits struct {
	budget  *gate         // bytes of all bodies
	maxBody int64         // bytes of one
	timeout time.Duration // the longest silence of an upload
	crowded func() bool   // somebody waits for what an upload holds

	longBytes atomic.Int64 // bytes of the budget that long uploads hold
}

// bodySource is a request whose body is to be read.
type bodySource struct {
	*http.Request
	conn       net.Conn
	reserve    func(n int64) error // takes n bytes of the budget, before those who have none yet
	yieldPlace func()              // gives up the place: the upload is charged as it comes from now on
}

// reservation returns how many bytes of the budget r's body needs; 0 if it has none.
func (b *bodyLimits) reservation(r *http.Request) int64 {
	if r.ContentLength < 0 { // chunked: nobody knows, so as much as is allowed
		return b.maxBody
	}
	return r.ContentLength
}

// read reads the body of u and takes over what was reserved for it. The body is returned with an error too, for its size;
// it is finished then.
func (b *bodyLimits) read(u bodySource) (body *requestBody, err error) {
	body = &requestBody{limits: b, reserved: b.reservation(u.Request)}
	guard := newUploadGuard(u, body)
	defer guard.stop()
	defer func() {
		if err != nil || !body.complete { // or panic
			body.finish()
		}
	}()
	// One byte more than is allowed, to see whether there is one.
	maxSize := b.maxBody + 1
	if u.ContentLength >= 0 {
		maxSize = u.ContentLength
	}
	var unwatch func() bool
	for {
		room, err := guard.room(maxSize)
		if err != nil {
			return body, err
		}
		n, err := u.Body.Read(room)
		guard.progress(n)
		body.filled(n)
		// net/http reports io.EOF together with the last byte of a declared length: nothing is asked for just to learn
		// that nothing follows.
		switch {
		case body.size > b.maxBody:
			return body, errBodyTooLarge(b.maxBody)
		case err == io.EOF:
			body.seal()
			return body, nil
		case err != nil:
			return body, guard.verdict(u.Context(), err)
		case unwatch == nil: // not before the first read: what has come is read, even if the process is about to end
			unwatch = context.AfterFunc(u.Context(), guard.interrupt)
			defer unwatch()
		}
	}
}

// segmentSize is how much memory a body gets at a time, in bytes. Segments are used again: fresh memory costs a sixth of
// all that is done for a large body.
const segmentSize = 64 << 10

var segments = sync.Pool{New: func() any { return new([segmentSize]byte) }}

// requestBody is a request's body in memory. Its bytes count against the budget from their reservation until nothing can
// need them any more.
type requestBody struct {
	limits *bodyLimits
	size   int64 // what has come; for the goroutine that reads the body

	mu        sync.Mutex
	content   [][]byte // in segments; only the last has room
	allocated int64    // bytes of all segments
	reserved  int64    // bytes of the budget
	long      bool     // a long upload: reserved follows allocated
	complete  bool     // all of it has come
	readers   int      // that are open
	done      bool     // no reader will be opened any more
}

// room returns free memory, never empty, for the next bytes of a body of at most maxSize bytes. For a long upload it first
// takes the budget's bytes with wait, whose error it returns.
func (b *requestBody) room(maxSize int64, wait func(n int64) error) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.size == b.allocated {
		n := min(segmentSize, maxSize-b.size)
		if b.long {
			b.mu.Unlock()
			err := wait(n)
			b.mu.Lock()
			if err != nil {
				return nil, err
			}
			b.reserved += n
			b.limits.longBytes.Add(n)
		}
		var segment []byte
		if n == segmentSize {
			segment = segments.Get().(*[segmentSize]byte)[:0]
		} else {
			segment = make([]byte, 0, n)
		}
		b.content = append(b.content, segment)
		b.allocated += n
	}
	last := b.content[len(b.content)-1]
	return last[len(last):cap(last)], nil
}

// filled says that n bytes have come into the room.
func (b *requestBody) filled(n int) {
	last := &b.content[len(b.content)-1]
	*last = (*last)[:len(*last)+n]
	b.size += int64(n)
}

// chargeAsItComes makes a long upload of b: it gives back the memory that is not filled yet. fits is false, and nothing has
// changed, if long uploads would then hold more than half of the budget: others are to have something.
func (b *requestBody) chargeAsItComes() (fits bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.long || b.reserved <= b.allocated {
		return true
	}
	if !b.limits.fitsLong(b.allocated) {
		return false
	}
	b.long = true
	b.limits.longBytes.Add(b.allocated)
	b.limits.budget.release(b.reserved - b.allocated)
	b.reserved = b.allocated
	return true
}

// fitsLong reports whether long uploads may hold n bytes more.
func (b *bodyLimits) fitsLong(n int64) bool { return b.longBytes.Load()+n <= b.budget.size/2 }

// seal says that the whole body has come. The last segment of a chunked body, whose length nobody knew, is cut to what is in
// it, and the rest of the reservation goes back.
func (b *requestBody) seal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if n := len(b.content) - 1; cap(b.content[n]) == segmentSize && len(b.content[n]) < segmentSize { // chunked
		segment := b.content[n]
		b.content[n] = bytes.Clone(segment)
		segments.Put((*[segmentSize]byte)(segment[:segmentSize]))
	}
	b.complete = true
	b.settle()
}

// open returns a reader of the whole body for one attempt.
func (b *requestBody) open() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers++
	return &attemptBody{body: b, rest: b.content}
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
	if b.long {
		b.long = false
		b.limits.longBytes.Add(-b.reserved)
	}
	needed := b.size
	if b.done && b.readers == 0 {
		for _, segment := range b.content {
			if cap(segment) == segmentSize {
				segments.Put((*[segmentSize]byte)(segment[:segmentSize]))
			}
		}
		needed, b.content = 0, nil
	}
	if excess := b.reserved - needed; excess > 0 {
		b.reserved = needed
		b.limits.budget.release(excess)
	}
}

// attemptBody reads a requestBody for one attempt; it copies nothing. net/http may close it in the middle of a Read.
type attemptBody struct {
	body   *requestBody
	rest   [][]byte
	offset int // in the first segment of the rest
	closed bool
}

// Read implements io.Reader. With the last byte the reader is done: over HTTP/2, net/http closes it
// only at the end of the answer.
func (c *attemptBody) Read(p []byte) (n int, err error) {
	c.body.mu.Lock()
	defer c.body.mu.Unlock()
	if c.closed && len(c.rest) > 0 {
		return 0, io.ErrClosedPipe
	}
	for len(c.rest) > 0 && n < len(p) {
		copied := copy(p[n:], c.rest[0][c.offset:])
		n += copied
		if c.offset += copied; c.offset == len(c.rest[0]) {
			c.rest, c.offset = c.rest[1:], 0
		}
	}
	if len(c.rest) == 0 {
		c.rest = nil
		c.close()
		return n, io.EOF
	}
	return n, nil
}

// Close implements io.Closer.
func (c *attemptBody) Close() error {
	c.body.mu.Lock()
	defer c.body.mu.Unlock()
	c.close()
	return nil
}

// close is Close for a caller that holds body.mu.
func (c *attemptBody) close() {
	if !c.closed {
		c.closed = true
		c.body.readers--
		c.body.settle()
	}
}

// uploadGuard ends an upload that falls silent and, while others wait, a slow one; a long one gives back what others wait
// for.
type uploadGuard struct {
	*watch
	bodySource
	body     *requestBody
	start    time.Time
	received atomic.Int64 // bytes so far
	latest   atomic.Int64 // when the latest of them came, in ns since start
	inLine   atomic.Bool  // the upload waits for memory: its client can do nothing

	windowEnd, paceEnd       time.Time
	beforeWindow, beforePace int64 // received when the window that ends then began

	failed atomic.Pointer[failure] // why the upload was ended
}

// newUploadGuard begins to guard an upload. It is to be stopped.
func newUploadGuard(u bodySource, body *requestBody) *uploadGuard {
	g := &uploadGuard{bodySource: u, body: body, start: time.Now()}
	g.windowEnd, g.paceEnd = g.start.Add(slowUploadWindow), g.start.Add(paceWindow)
	g.watch = startWatch(min(paceWindow, body.limits.timeout), g.judge)
	return g
}

// progress says that n bytes have come.
func (g *uploadGuard) progress(n int) {
	g.received.Add(int64(n))
	g.latest.Store(int64(time.Since(g.start)))
}

// room returns memory for the next bytes of a body of at most maxSize bytes.
func (g *uploadGuard) room(maxSize int64) ([]byte, error) {
	room, err := g.body.room(maxSize, func(n int64) error {
		if !g.body.limits.fitsLong(n) && g.body.limits.crowded() {
			return errSlowUpload
		}
		g.inLine.Store(true)
		defer g.inLine.Store(false)
		err := g.reserve(n)
		g.progress(0)
		return err
	})
	if g.ContentLength < 0 { // net/http fills what it gets from a chunk: not so much that progress can't be seen
		room = room[:min(len(room), chunkStep)]
	}
	return room, err
}

// judge ends the upload if that is due, or returns when to look again.
func (g *uploadGuard) judge(now time.Time) time.Duration {
	limits, received, waited := g.body.limits, g.received.Load(), g.inLine.Load()
	silentAt := g.start.Add(time.Duration(g.latest.Load()) + limits.timeout)
	if waited {
		silentAt = now.Add(limits.timeout)
	}
	if !now.Before(g.paceEnd) {
		pace := (received - g.beforePace) * int64(longUpload/paceWindow)
		if !waited && limits.reservation(g.Request)-received > pace && limits.crowded() {
			if !g.body.chargeAsItComes() {
				g.failed.Store(errSlowUpload)
			}
			g.yieldPlace()
		}
		g.beforePace, g.paceEnd = received, now.Add(paceWindow)
	}
	if waited || !now.Before(g.windowEnd) {
		if !waited && received-g.beforeWindow < slowUploadBytes && limits.crowded() {
			g.failed.Store(errSlowUpload)
		}
		g.beforeWindow, g.windowEnd = received, now.Add(slowUploadWindow)
	}
	if !now.Before(silentAt) {
		g.failed.Store(errSilentUpload)
	}
	if g.failed.Load() != nil {
		g.interrupt()
		return 0
	}
	return min(g.windowEnd.Sub(now), g.paceEnd.Sub(now), silentAt.Sub(now))
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
