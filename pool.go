package main

import (
	"container/list"
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// requestsAtOnce bounds what shares a connection: what ends one connection ends few requests.
	requestsAtOnce = 100
	// cancelledAtMost is how many cancelled requests a connection bears. Servers close those on which most were cancelled, and
	// with them the requests of others.
	cancelledAtMost = 100
	// standstill is how long a body may stand still before its connection takes no further requests: the upstream does not
	// read it, and the window that all bodies of a connection share may be full.
	standstill = time.Second
	// upstreamIdle is how long an unused connection is kept. The API's edge closes them at 400 s;
	// closing first avoids the race of a request with that close.
	upstreamIdle = 5 * time.Minute
)

// pool says which connection to the upstream takes a request, and opens connections. Unlike http.Transport's it sends nothing
// twice, opens no more than needed, and keeps what one request does to its connection from others.
type pool struct {
	transport *http.Transport // opens connections, and is their configuration
	scheme    string
	addr      string        // host:port
	timeout   time.Duration // for TCP and TLS together
	started   time.Time

	queued atomic.Int32 // the length of waiting

	mu      sync.Mutex
	conns   []*pooledConn // oldest first
	waiting list.List     // of *poolWaiter, in arrival order
	arrived uint64        // waiters so far
	dialing int
	perDial int // places on the newest connection: 1 means HTTP/1.1; 0: none was opened yet
}

// pooledConn is a connection of a pool. All but its constants is guarded by the pool's mu.
type pooledConn struct {
	*http.ClientConn
	pool   *pool
	socket *upstreamConn
	places int // requests at once

	busy      int // requests that have one
	cancelled int // requests that were given up so far
	idleSince time.Time
	idle      *time.Timer
	uploads   map[*trip]struct{} // whose body is not read to its end
}

// poolWaiter is a request that waits for a place.
type poolWaiter struct {
	number  uint64 // in order of arrival
	granted chan poolGrant
}

// poolGrant is a place on a connection, or why there is none.
type poolGrant struct {
	conn *pooledConn
	err  error
}

// reserve returns the newest connection with a place. It waits for one until ctx ends; its error is then ctx's cause, and
// otherwise a [dialError]. The place is for one call of roundTrip.
func (p *pool) reserve(ctx context.Context) (*pooledConn, error) {
	p.mu.Lock()
	if p.waiting.Len() == 0 {
		if c := p.free(); c != nil {
			p.mu.Unlock()
			return c, nil
		}
	}
	p.arrived++
	w := &poolWaiter{number: p.arrived, granted: make(chan poolGrant, 1)}
	p.queued.Add(1) // before the look in serve: what changes after that is told by changed
	place := p.waiting.PushBack(w)
	p.serve()
	p.mu.Unlock()

	select {
	case g := <-w.granted:
		return g.conn, g.err
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case g := <-w.granted: // at the same moment: hand it on
		if g.conn != nil {
			g.conn.Release()
			g.conn.leave()
		}
	default:
		p.waiting.Remove(place)
		p.queued.Add(-1)
	}
	return nil, context.Cause(ctx)
}

// free takes a place on the newest connection that has one; nil if none has. The caller holds p.mu.
func (p *pool) free() *pooledConn {
	for _, c := range slices.Backward(p.conns) {
		switch {
		case c.busy >= c.places, c.cancelled >= cancelledAtMost, c.standsStill():
		case c.Err() != nil:
			p.forget(c)
		case c.Reserve() == nil:
			c.busy++
			return c
		}
	}
	return nil
}

// forget takes c out of the pool. The caller holds p.mu.
func (p *pool) forget(c *pooledConn) {
	p.conns = slices.DeleteFunc(slices.Clone(p.conns), func(other *pooledConn) bool { return other == c })
	c.idle.Stop()
}

// serve gives places to those that wait, and opens connections for the others. The caller holds p.mu.
func (p *pool) serve() {
	for p.waiting.Len() > 0 {
		c := p.free()
		if c == nil {
			break
		}
		p.grant(poolGrant{conn: c})
	}
	wanted := min(p.waiting.Len(), 1) // until it is known how many a connection takes
	if p.perDial > 0 {
		wanted = (p.waiting.Len() + p.perDial - 1) / p.perDial
	}
	for ; p.dialing < wanted; p.dialing++ {
		go p.dial(p.arrived)
	}
}

// grant hands g to the first that waits. The caller holds p.mu.
func (p *pool) grant(g poolGrant) {
	p.waiting.Remove(p.waiting.Front()).(*poolWaiter).granted <- g
	p.queued.Add(-1)
}

// changed is the connections' state hook. net/http calls it inside of Reserve too, under p.mu.
func (p *pool) changed(*http.ClientConn) {
	if p.queued.Load() > 0 {
		go func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.serve()
		}()
	}
}

// dial opens a connection. If it fails, so do those for whom it was: as many as would have got a place, but nobody who came
// after number newest.
func (p *pool) dial(newest uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), p.timeout) // no request's: another one may get the connection
	defer cancel()
	c := &pooledConn{pool: p, idleSince: time.Now(), uploads: map[*trip]struct{}{}}
	var err error
	c.ClientConn, err = p.transport.NewClientConn(withDialed(ctx, &c.socket), p.scheme, p.addr)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialing--
	if err == nil {
		c.places = max(1, min(c.Available(), requestsAtOnce))
		c.idle = time.AfterFunc(upstreamIdle, c.closeIfIdle)
		p.perDial = c.places
		p.conns = append(p.conns, c)
		c.SetStateHook(p.changed)
	} else {
		failed := p.perDial
		if failed == 0 {
			failed = math.MaxInt
		}
		for ; failed > 0 && p.waiting.Len() > 0 && p.waiting.Front().Value.(*poolWaiter).number <= newest; failed-- {
			p.grant(poolGrant{err: &dialError{err}})
		}
	}
	p.serve()
}

// closeIdle closes the connections that no request uses.
func (p *pool) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		if c.busy == 0 {
			p.forget(c)
			go c.Close()
		}
	}
}

// closeIfIdle closes c once it was unused for upstreamIdle.
func (c *pooledConn) closeIfIdle() {
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	left := upstreamIdle - time.Since(c.idleSince)
	switch {
	case c.busy > 0:
		c.idle.Reset(upstreamIdle)
	case left > 0:
		c.idle.Reset(left)
	default:
		c.pool.forget(c)
		go c.Close()
	}
}

// standsStill reports whether a body stands still. The caller holds the pool's mu.
func (c *pooledConn) standsStill() bool {
	for t := range c.uploads {
		if time.Since(c.pool.started)-time.Duration(t.asked.Load()) > standstill {
			return true
		}
	}
	return false
}

// leave gives a place on c back. The caller holds the pool's mu.
func (c *pooledConn) leave() {
	c.busy--
	if c.busy == 0 {
		c.idleSince = time.Now()
		if c.cancelled >= cancelledAtMost {
			c.pool.forget(c)
			go c.Close()
		}
	}
	if c.pool.waiting.Len() > 0 {
		c.pool.serve()
	}
}

// trip is one request's way over a connection and back.
type trip struct {
	conn   *pooledConn
	body   io.ReadCloser // the request's
	asked  atomic.Int64  // when more of it was asked for last, after the pool's start
	answer io.ReadCloser
	whole  bool // the answer was read to its end
	ended  bool
}

// roundTrip sends req once, on the place that was reserved for it. The answer's body must be closed. An error is an
// [unprocessedError] if the upstream can't have processed the request.
func (c *pooledConn) roundTrip(req *http.Request) (*http.Response, error) {
	t := &trip{conn: c, body: req.Body}
	if t.body != nil {
		req.Body = (*upload)(t)
	}
	before := c.socket.written.Load()
	resp, err := c.RoundTrip(req)
	if err != nil {
		t.end()
		if c.socket.written.Load() == before || isUnprocessed(err) {
			err = &unprocessedError{err}
		}
		return nil, err
	}
	t.answer = resp.Body
	resp.Body = (*download)(t)
	return resp, nil
}

// end gives the place back.
func (t *trip) end() {
	c := t.conn
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	if t.ended {
		return
	}
	t.ended = true
	delete(c.uploads, t)
	if !t.whole {
		c.cancelled++
	}
	c.leave()
}

// upload is the body of a trip's request.
type upload trip

// Read implements io.Reader. net/http reads on when the upstream's window takes more.
func (u *upload) Read(p []byte) (int, error) {
	first := u.asked.Swap(int64(time.Since(u.conn.pool.started))) == 0
	n, err := u.body.Read(p)
	if first && err != nil { // small: read at once
		return n, err
	}
	u.conn.pool.mu.Lock()
	defer u.conn.pool.mu.Unlock()
	if err != nil || u.ended {
		delete(u.conn.uploads, (*trip)(u))
	} else {
		u.conn.uploads[(*trip)(u)] = struct{}{}
	}
	return n, err
}

// Close implements io.Closer.
func (u *upload) Close() error { return u.body.Close() }

// download is the body of a trip's answer.
type download trip

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	n, err := d.answer.Read(p)
	d.whole = d.whole || err == io.EOF
	return n, err
}

// Close implements io.Closer.
func (d *download) Close() error {
	err := d.answer.Close()
	(*trip)(d).end()
	return err
}

// unprocessedError is a request that the upstream can't have processed: it may be sent again.
type unprocessedError struct{ error }

// Unwrap gives errors.AsType the cause.
func (e *unprocessedError) Unwrap() error { return e.error }

// streamError has the fields of net/http's HTTP/2 stream errors, which fill it in errors.As.
type streamError struct {
	StreamID uint32
	Code     uint32
	Cause    error
}

// Error implements error.
func (e streamError) Error() string { return "HTTP/2 stream error" }

// isUnprocessed reports whether err says that an HTTP/2 upstream has not processed the request (RFC 9113, 8.7): it refused the
// stream, said so with GOAWAY, or the connection was closed before the stream began. net/http names the latter two
// by their text alone.
func isUnprocessed(err error) bool {
	const refusedStream = 7
	if stream, ok := errors.AsType[streamError](err); ok {
		return stream.Code == refusedStream
	}
	switch err.Error() {
	case "http2: Transport received Server's graceful shutdown GOAWAY", "http2: client conn not usable", "http2: client conn could not be established":
		return true
	}
	return false
}
