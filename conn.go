package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Socket buffers count towards a container's memory, from accept on.
const (
	// sendBuffer is how much of an answer the kernel keeps for its client, in bytes (it takes twice that for it). Left alone
	// this grows to 4 MiB; and as a writer is woken only when a third of it is free, a client that reads slowly seems to
	// have stopped. Twice as much makes answers of 10 MiB no faster.
	sendBuffer = 32 << 10
	// receiveBuffer is what the kernel keeps of an upload that waits in line, in bytes, if GOMEMLIMIT is set. It is the TCP
	// window too, which makes large uploads slow: one of largeBody bytes or more gets largeReceiveBuffer when its turn comes
	// (Linux grants no more), but only on one connection in wideShare, since an offered window can't be taken back.
	receiveBuffer      = 8 << 10
	largeReceiveBuffer = 208 << 10
	largeBody          = 1 << 20
	wideShare          = 32 // one connection in so many
)

// idleGrace is how long a connection has no request, at least, before it is closed for a newer one.
const idleGrace = time.Second

// An answer whose client reads nothing is stalled. It holds what the upstream sends ahead, and a send buffer: 320 KiB. One in
// stallShare of the connections, and at least one, may be stalled for longer than stallGrace; beyond that, those that have been
// stalled the longest are ended.
const (
	stallGrace = time.Second
	stallShare = 16
)

// clientListener accepts the connections of clients, limit at once. When they are full, the one that has had no request for
// the longest time is closed for each that comes. When all have one, clients wait in the kernel.
type clientListener struct {
	net.Listener
	limit   int
	headers *gate     // bytes of large request headers
	start   time.Time // what times are counted from: the wall clock may be set

	mu     sync.Mutex
	open   map[*clientConn]struct{}
	wide   int // connections with a largeReceiveBuffer
	closed bool
	change sync.Cond   // a connection has closed, or has no request any more
	full   atomic.Bool // a client waits
}

// newClientListener returns a listener for at most limit connections.
func newClientListener(from net.Listener, limit int) *clientListener {
	l := &clientListener{Listener: from, limit: limit, headers: newGate(headerMemory), start: time.Now(), open: map[*clientConn]struct{}{}}
	l.change.L = &l.mu
	time.AfterFunc(stallGrace, l.endStalled)
	return l
}

// Accept implements net.Listener.
func (l *clientListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.admit(&clientConn{Conn: conn})
}

// admit takes c, which has just been accepted, when there is room.
func (l *clientListener) admit(c *clientConn) (net.Conn, error) {
	if tcp, ok := c.Conn.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
		if underMemoryLimit() {
			onSocket(tcp, func(fd int) { setBufferLock(fd, true) })
		}
	}
	c.listener, c.header = l, headerProgress{first: true}
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(l.open) >= l.limit && !l.closed {
		l.full.Store(true)
		if !l.makeRoom() {
			l.change.Wait()
		}
	}
	l.full.Store(false)
	if l.closed {
		c.Conn.Close()
		return nil, net.ErrClosed
	}
	c.idle()
	l.open[c] = struct{}{}
	return c, nil
}

// makeRoom closes the connection that has been idle for the longest time, unless it has something unread: a request is
// coming, and it counts as idle from now. It returns true if it is worth looking again at once; otherwise l.change is
// signalled when a connection becomes idle, or has been for idleGrace. The caller holds l.mu, which Close needs meanwhile.
func (l *clientListener) makeRoom() bool {
	var idle *clientConn
	since := time.Duration(math.MaxInt64)
	for c := range l.open {
		if at := time.Duration(c.idleSince.Load()); at != busy && at < since {
			idle, since = c, at
		}
	}
	if idle == nil {
		return false
	}
	if young := since + idleGrace - time.Since(l.start); young > 0 {
		time.AfterFunc(young, l.changed)
		return false
	}
	if hasUnread(idle.Conn) {
		idle.idle()
		return true
	}
	l.mu.Unlock()
	idle.Close()
	l.mu.Lock()
	return true
}

// endStalled ends stalled answers beyond their share, and looks again every stallGrace/4 until the listener is closed.
func (l *clientListener) endStalled() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	time.AfterFunc(stallGrace/4, l.endStalled)
	stalled := map[*clientConn]int64{}
	for c := range l.open {
		if since := c.writing.Load(); since != notWriting && time.Since(l.start)-time.Duration(since) >= stallGrace {
			stalled[c] = since
		}
	}
	excess := len(stalled) - max(1, l.limit/stallShare)
	if excess <= 0 {
		return
	}
	byAge := slices.SortedFunc(maps.Keys(stalled), func(a, b *clientConn) int { return cmp.Compare(stalled[a], stalled[b]) })
	for _, c := range byAge[:excess] {
		c.SetWriteDeadline(time.Unix(1, 0))
	}
}

// changed has Accept look again for room.
func (l *clientListener) changed() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.change.Broadcast()
}

// Close implements net.Listener.
func (l *clientListener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.changed()
	return l.Listener.Close()
}

// connections returns how many there are.
func (l *clientListener) connections() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.open)
}

// clientConn is a client's connection. Who is behind it can't change while it lasts.
type clientConn struct {
	net.Conn
	listener  *clientListener
	idleSince atomic.Int64 // when it was last heard of without a request, in ns since listener.start; or busy
	writing   atomic.Int64 // when the present write began, in ns since listener.start; or notWriting
	header    headerProgress
	charged   atomic.Int64 // bytes of headerMemory
	wide      bool         // for the holder of listener.mu

	firstRead func(p []byte) (n int, err error) // takes the PROXY header from the first read; nil without one, and after that
	claimed   netip.AddrPort                    // the client's address by its PROXY header, if it has one

	mu     sync.Mutex
	latest *lookup // of the caller; nil before the first
}

const busy, notWriting = -1, 0

// connState is an http.Server's.
func connState(conn net.Conn, state http.ConnState) {
	switch c := conn.(*clientConn); state {
	case http.StateActive:
		c.idleSince.Store(busy)
	case http.StateIdle:
		c.forgetHeader()
		c.header = headerProgress{}
		c.idle()
		if c.listener.full.Load() {
			c.listener.changed()
		}
	}
}

// idle counts c as idle from now: after a request, and again for each part of the next one's header.
func (c *clientConn) idle() { c.idleSince.Store(int64(time.Since(c.listener.start))) }

// widen has the kernel take more of a large body at a time.
func (c *clientConn) widen() {
	l := c.listener
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.wide && l.wide <= l.limit/wideShare && underMemoryLimit() {
		c.wide = true
		l.wide++
		setReceiveBuffer(c.Conn, largeReceiveBuffer)
	}
}

// underMemoryLimit reports whether GOMEMLIMIT is set, as our manifests do.
func underMemoryLimit() bool { return os.Getenv("GOMEMLIMIT") != "" }

// Write implements net.Conn.
func (c *clientConn) Write(p []byte) (int, error) {
	c.writing.Store(max(1, int64(time.Since(c.listener.start))))
	defer c.writing.Store(notWriting)
	n, err := c.Conn.Write(p)
	if tcp, ok := c.Conn.(*net.TCPConn); ok && errors.Is(err, os.ErrDeadlineExceeded) {
		tcp.SetLinger(0) // the kernel would keep the rest for a client that does not read
	}
	return n, err
}

// Close implements net.Conn.
func (c *clientConn) Close() error {
	c.forgetHeader()
	l := c.listener
	l.mu.Lock()
	delete(l.open, c)
	if c.wide {
		c.wide = false
		l.wide--
	}
	l.mu.Unlock()
	l.changed()
	return c.Conn.Close()
}

// CloseWrite lets net/http half-close c after an answer that came before the request's body was read: the client can still
// read it.
func (c *clientConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// Bounds of a request's headers. What they cost besides their bytes goes with their number.
const (
	firstRequestTime = 30 * time.Second // a new connection's time to begin one
	headerTime       = 10 * time.Second // from a request's first byte to the end of its headers
	maxFields        = 256              // more are answered with 431
	maxHeader        = 64 << 10         // bytes, with the request line; more are answered with 431

	smallHeader  = 8 << 10 // bytes that each connection may have
	headerMemory = 8 << 20 // bytes for what is larger, of all connections; twice what comes, as net/http copies it
)

// headerProgress counts what has come of the header that is being read.
type headerProgress struct {
	first   bool // it is the connection's first
	read    int  // bytes so far
	lines   int  // complete ones so far, the request line included
	line    int  // bytes of the unfinished one
	ended   bool // its empty line has come
	tooMany bool // it has more than maxFields
}

// Read implements net.Conn. Between two requests it reads headers, of which it bounds the time and the memory: net/http takes a
// thousand bytes for each line, before anybody can count them.
func (c *clientConn) Read(p []byte) (n int, err error) {
	h := &c.header
	switch {
	case c.idleSince.Load() == busy:
		return c.Conn.Read(p)
	case h.tooMany:
		return fill(p), nil
	case h.read == 0 && h.first:
		c.SetReadDeadline(time.Now().Add(firstRequestTime))
	case h.read >= smallHeader:
		if err := c.chargeHeader(2 * int64(len(p))); err != nil {
			return 0, err
		}
	}
	if read := c.firstRead; read != nil {
		c.firstRead = nil
		n, err = read(p)
		c.SetReadDeadline(time.Now().Add(firstRequestTime))
	}
	if n == 0 && err == nil {
		n, err = c.Conn.Read(p)
	}
	if n > 0 {
		c.idle() // it is in use, but net/http calls it active only once the header is whole
	}
	if h.read == 0 && h.first {
		c.SetReadDeadline(time.Now().Add(headerTime))
	}
	fill(p[h.within(p[:n]):n])
	return n, err
}

// within counts the lines of what has come, up to the empty one that ends the header, and returns how many bytes of it are
// within the bounds.
func (h *headerProgress) within(p []byte) (n int) {
	h.read += len(p)
	for !h.ended {
		line, _, whole := bytes.Cut(p[n:], []byte("\n"))
		h.line += len(bytes.TrimSuffix(line, []byte("\r")))
		if !whole {
			break
		}
		n += len(line) + 1
		if h.lines > maxFields && h.line > 0 {
			h.tooMany = true
			return n
		}
		h.ended = h.line == 0
		h.lines, h.line = h.lines+1, 0
	}
	return len(p)
}

// fill makes p blanks, which continue the line before (RFC 9112, 5.2). net/http skips them, up to its limit, and then refuses the
// header in its own way: a long line it would keep, of every client at once.
func fill(p []byte) int {
	for i := range p {
		p[i] = ' '
	}
	return len(p)
}

// chargeHeader takes n bytes for a header that is not small, for as long as that may take to come.
func (c *clientConn) chargeHeader(n int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), headerTime)
	defer cancel()
	if c.listener.headers.acquire(ctx, n, true) != nil {
		return os.ErrDeadlineExceeded
	}
	c.charged.Add(n)
	return nil
}

// forgetHeader says that nobody needs the request's header any more.
func (c *clientConn) forgetHeader() {
	if n := c.charged.Swap(0); n > 0 {
		c.listener.headers.release(n)
	}
}

// lookup is a question to tailscaled, and its answer.
type lookup struct {
	begun time.Time
	done  chan struct{} // closed once who and err are set
	who   identity
	err   error
}

// connKey is the context key of a request's *clientConn.
type connKey struct{}

// withConn is an http.Server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	return context.WithValue(ctx, connKey{}, conn)
}

// connOf returns the connection that r came over.
func connOf(r *http.Request) *clientConn { return r.Context().Value(connKey{}).(*clientConn) }

// caller returns the look-up of who is behind c. It begins one with whoIs unless there is an answer that is younger than
// lasts, or one is under way: one for each request would cost most of the proxy's throughput.
func (c *clientConn) caller(lasts time.Duration, whoIs func(ctx context.Context, addr string) (identity, error)) *lookup {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.latest; l != nil && (l.pending() || l.err == nil && time.Since(l.begun) < lasts) {
		return l
	}
	addr := c.RemoteAddr().String()
	if c.claimed.IsValid() {
		addr = c.claimed.String()
	}
	l := &lookup{begun: time.Now(), done: make(chan struct{})}
	c.latest = l
	go func() {
		defer close(l.done)
		l.who, l.err = whoIs(context.Background(), addr)
	}()
	return l
}

// pending reports whether the answer is still awaited.
func (l *lookup) pending() bool {
	if l == nil {
		return false
	}
	select {
	case <-l.done:
		return false
	default:
		return true
	}
}

// answer returns who the caller is, as far as it is known.
func (l *lookup) answer() identity {
	if l == nil || l.pending() {
		return identity{}
	}
	return l.who
}

// require waits for the answer. It refuses callers that tailscaled does not know (403), or that lack a capability that is not
// empty (403), and all while tailscaled can't be asked (503).
func (l *lookup) require(ctx context.Context, capability string) error {
	select {
	case <-l.done:
	case <-ctx.Done():
		return departure(ctx)
	}
	switch {
	case l.err != nil:
		return errLookupFailed
	case l.who == identity{}:
		return errUnknownCaller
	case capability != "" && !l.who.capable:
		return errNotGranted(capability, l.who.node)
	}
	return nil
}

// unreadGrace is how long the rest of a refused request's body is waited for.
const unreadGrace = time.Second

// leaveUnread has the connection closed after an answer that does not wait for the request's body:
// net/http would read that first, for as long as the client likes. What still comes within unreadGrace is
// read, since a connection that is closed on unread bytes is reset, and the answer lost.
func leaveUnread(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	// Hitting a limit has net/http wait for half a second before it closes, so that the answer can be read. On a
	// client that has asked for the close itself it would not wait otherwise.
	http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(unreadGrace))
}
