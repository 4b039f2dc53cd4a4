package main

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"
)

const (
	// requestsAtOnce bounds what shares a connection: what ends one connection ends few requests.
	requestsAtOnce = 100
	// cancelledAtMost is how many cancelled requests a connection bears. Servers close those on which most were cancelled, and
	// with them the requests of others.
	cancelledAtMost = 100
	// uploadStall is how long a body may make no progress before its connection takes no further requests: the upstream
	// does not read it, and the window that all bodies of a connection share may be full.
	uploadStall = time.Second
	// upstreamIdle is how long an unused connection is kept. The API's edge closes them at 400 s;
	// closing first avoids the race of a request with that close.
	upstreamIdle = 5 * time.Minute
)

// errClosedUnused is a connection that was opened in vain.
var errClosedUnused = errors.New("the upstream closed the connection before a request was sent")

// pool says which connection to the upstream takes a request, and opens connections. Unlike http.Transport's it sends nothing
// twice, opens no more than needed, and keeps what one request does to its connection from others.
type pool struct {
	transport    *http.Transport // opens connections, and is their configuration
	scheme, addr string
	timeout      time.Duration // for DNS, forward proxy, TCP and TLS together

	mu          sync.Mutex
	conns       []*pooledConn // oldest first
	waiting     int           // calls of reserve
	news        chan struct{} // closed and replaced when they should look again
	dialing     int           // dials under way
	dials       int           // dials so far
	failedDial  int           // the number of the dial that failed last; 0: none
	dialFailure error         // why
	perDial     int           // places on the newest connection: 1 means HTTP/1.1; 0: none was opened yet
}

// pooledConn is a connection of a pool, whose mu guards all that changes.
type pooledConn struct {
	*http.ClientConn
	pool   *pool
	socket *upstreamConn
	places int // requests at once

	unusedDial int                 // the number of its dial, until a place on it is taken; then 0
	inUse      int                 // requests that have a place
	cancelled  int                 // requests so far whose answer was not read to its end: given up, timed out or failed
	uploads    map[*trip]time.Time // bodies that are not read to their end, and when a part of them was read last
	idle       *time.Timer
}

// newPool returns a pool of connections to addr, HOST:PORT.
func newPool(scheme, addr string, timeout time.Duration, transport *http.Transport) *pool {
	return &pool{scheme: scheme, addr: addr, timeout: timeout, transport: transport, news: make(chan struct{})}
}

// reserve returns the newest connection with a place, which is for one call of roundTrip. It waits for one until ctx ends;
// its error is then ctx's cause, and otherwise a [dialError] of a dial that began later than the wait.
func (p *pool) reserve(ctx context.Context) (*pooledConn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.waiting++
	defer func() { p.waiting-- }()
	for before := p.dials; ; {
		if c := p.tryReserve(); c != nil {
			return c, nil
		}
		if p.failedDial > before {
			return nil, &dialError{p.dialFailure}
		}
		wanted := 1 // until it is known how many requests a connection takes
		if p.perDial > 0 {
			wanted = (p.waiting + p.perDial - 1) / p.perDial
		}
		for ; p.dialing < wanted; p.dialing++ {
			p.dials++
			go p.dial(p.dials)
		}
		news := p.news
		p.mu.Unlock()
		select {
		case <-news:
		case <-ctx.Done():
		}
		p.mu.Lock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// tryReserve takes a place on the newest connection that has one, and drops the closed ones that it meets; nil if there is
// no place. The caller holds p.mu.
func (p *pool) tryReserve() *pooledConn {
	for _, c := range slices.Backward(p.conns) {
		switch {
		case c.inUse >= c.places, c.cancelled >= cancelledAtMost, c.hasStalled():
		case c.Err() != nil:
			if c.unusedDial > p.failedDial {
				p.failedDial, p.dialFailure = c.unusedDial, errClosedUnused // or else it would be dialled for ever
			}
			p.drop(c)
		case c.Reserve() == nil:
			c.unusedDial = 0
			c.inUse++
			return c
		}
	}
	return nil
}

// drop closes c and takes it out of the pool, in a new slice: callers range over the old one. The caller holds p.mu.
func (p *pool) drop(c *pooledConn) {
	p.conns = slices.DeleteFunc(slices.Clone(p.conns), func(other *pooledConn) bool { return other == c })
	c.idle.Stop()
	go c.Close()
}

// tell has those that wait look again. The caller holds p.mu.
func (p *pool) tell() {
	if p.waiting > 0 {
		close(p.news)
		p.news = make(chan struct{})
	}
}

// dial opens a connection, for whoever waits when it is there.
func (p *pool) dial(number int) {
	ctx, cancel := context.WithTimeout(context.Background(), p.timeout)
	defer cancel()
	c := &pooledConn{pool: p, unusedDial: number, uploads: map[*trip]time.Time{}}
	var err error
	c.ClientConn, err = p.transport.NewClientConn(withDialed(ctx, &c.socket), p.scheme, p.addr)

	p.mu.Lock()
	defer p.mu.Unlock()
	p.dialing--
	if err != nil {
		p.failedDial, p.dialFailure = number, err
	} else {
		c.places = max(1, min(c.Available(), requestsAtOnce))
		c.idle = time.AfterFunc(upstreamIdle, c.closeIfIdle)
		p.perDial = c.places
		p.conns = append(p.conns, c)
	}
	p.tell()
}

// closeIdle closes the connections that no request uses.
func (p *pool) closeIdle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		if c.inUse == 0 {
			p.drop(c)
		}
	}
}

// closeIfIdle closes c if no request uses it.
func (c *pooledConn) closeIfIdle() {
	c.pool.mu.Lock()
	defer c.pool.mu.Unlock()
	if c.inUse == 0 {
		c.pool.drop(c)
	}
}

// hasStalled reports whether a request's body on c has made no progress for uploadStall. The caller holds the pool's mu.
func (c *pooledConn) hasStalled() bool {
	for _, moved := range c.uploads {
		if time.Since(moved) > uploadStall {
			return true
		}
	}
	return false
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

// trip is one request's way over a connection and back.
type trip struct {
	conn         *pooledConn
	body, answer io.ReadCloser
	whole, ended bool // the answer was read to its end; the place was given back
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
	if c.inUse--; c.inUse == 0 && c.cancelled >= cancelledAtMost {
		c.pool.drop(c)
	} else if c.inUse == 0 {
		c.idle.Reset(upstreamIdle)
	}
	c.pool.tell()
}

// upload is the body of a trip's request.
type upload trip

// Read implements io.Reader. net/http reads on when the upstream's window takes more.
func (u *upload) Read(p []byte) (int, error) {
	n, err := u.body.Read(p)
	u.conn.pool.mu.Lock()
	defer u.conn.pool.mu.Unlock()
	if err == nil && !u.ended {
		u.conn.uploads[(*trip)(u)] = time.Now()
	} else {
		delete(u.conn.uploads, (*trip)(u))
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
	defer (*trip)(d).end()
	return d.answer.Close()
}

// unprocessedError is a request that the upstream can't have processed: it may be sent again.
type unprocessedError struct{ error }

// Unwrap gives errors.AsType the cause.
func (e *unprocessedError) Unwrap() error { return e.error }

// streamError has the fields of net/http's HTTP/2 stream errors, which fill it in errors.AsType.
type streamError struct {
	StreamID, Code uint32
	Cause          error
}

// Error implements error.
func (e streamError) Error() string { return "HTTP/2 stream error" }

// isUnprocessed reports whether err says that an HTTP/2 upstream has not processed the request (RFC 9113, 8.7): it refused the
// stream, said so with GOAWAY, or the connection was closed before the stream began. net/http names the latter two
// by their text alone.
func isUnprocessed(err error) bool {
	const refusedStream = 7
	stream, _ := errors.AsType[streamError](err)
	return stream.Code == refusedStream || slices.Contains([]string{
		"http2: Transport received Server's graceful shutdown GOAWAY",
		"http2: client conn not usable",
		"http2: client conn could not be established",
	}, err.Error())
}
