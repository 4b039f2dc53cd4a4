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
	"time"
)

// An upload that brings less than slowUploadBytes in slowUploadWindow is given up while others wait
// for the memory that it holds.
const (
	slowUploadWindow = 10 * time.Second
	slowUploadBytes  = 10 * 8 << 10
)

// requestBody is a request body in memory, so that an attempt can be repeated. Its bytes count
// against the budget from reservation until nothing can need them any more.
type requestBody struct {
	data   []byte
	budget *gate

	mu       sync.Mutex
	reserved int64
	readers  int  // attempts that still read data
	done     bool // no further attempt will start
}

// open returns a reader of the whole body for one attempt. Closing it more than once is fine.
func (b *requestBody) open() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.readers++
	return &bodyReader{Reader: bytes.NewReader(b.data), body: b}
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
	needed := int64(len(b.data))
	if b.done && b.readers == 0 {
		needed, b.data = 0, nil
	}
	if excess := b.reserved - needed; excess > 0 {
		b.reserved = needed
		b.budget.release(excess)
	}
}

// bodyReader reads a requestBody for one attempt.
type bodyReader struct {
	*bytes.Reader
	body   *requestBody
	closed sync.Once
}

// Close implements io.Closer.
func (r *bodyReader) Close() error {
	r.closed.Do(func() {
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
	size := x.r.ContentLength
	if size == 0 {
		return nil, nil
	}
	if size < 0 { // chunked: nobody knows, so as much as is allowed
		size = p.cfg.maxBody
	}
	if err := p.waitInLine(x, p.bodyBudget, size); err != nil {
		return nil, err
	}
	body := &requestBody{budget: p.bodyBudget, reserved: size}
	data, err := p.upload(x)
	x.bytesIn = int64(len(data))
	if err != nil {
		body.finish()
		return nil, err
	}
	body.mu.Lock()
	defer body.mu.Unlock()
	body.data = data
	body.settle()
	return body, nil
}

// upload reads the request's body into memory of its own.
func (p *proxy) upload(x *exchange) ([]byte, error) {
	guard := p.guardUpload(x)
	defer guard.stop()
	data := make([]byte, 0, max(x.r.ContentLength, bytes.MinRead))
	for {
		if len(data) == cap(data) {
			data = append(data, 0)[:len(data)]
		}
		guard.extend(len(data))
		n, err := x.r.Body.Read(data[len(data):cap(data)])
		data = data[:len(data)+n]
		if int64(len(data)) > p.cfg.maxBody {
			return data, errBodyTooLarge(p.cfg.maxBody)
		}
		// net/http reports io.EOF together with the last byte of a declared length, so that such
		// a body is never copied to a larger buffer just to learn that nothing follows.
		if err != nil {
			return data, guard.verdict(x.r.Context(), err)
		}
	}
}

// uploadGuard bounds the silence within one upload and, while others wait for memory, its slowness.
type uploadGuard struct {
	control *http.ResponseController
	budget  *gate

	mu       sync.Mutex
	silence  rollingDeadline
	received int  // bytes so far
	counted  int  // received at the beginning of the present window
	slow     bool // given up for slowness
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
func (g *uploadGuard) extend(received int) {
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
	var network net.Error
	switch {
	case err == io.EOF:
		return nil
	case g.slow:
		return errSlowUpload
	case errors.Is(err, os.ErrDeadlineExceeded):
		return errSilentUpload
	case errors.Is(err, io.ErrUnexpectedEOF), errors.As(err, &network), ctx.Err() != nil:
		return departure(ctx)
	default:
		return errMalformedBody
	}
}

// rollingDeadline keeps a deadline at least timeout ahead of the newest use. It is moved only when
// an eighth of that has passed, since moving it costs more than reading a chunk.
type rollingDeadline struct {
	set     func(time.Time) error
	timeout time.Duration
	moved   time.Time
}

// extend moves the deadline ahead of the read or write that comes next.
func (d *rollingDeadline) extend() {
	if now := time.Now(); now.Sub(d.moved) > d.timeout/8 {
		d.set(now.Add(d.timeout + d.timeout/8))
		d.moved = now
	}
}
