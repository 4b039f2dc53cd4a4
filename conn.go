package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// sendBuffer is how much of an answer the kernel keeps for its client, in bytes (it takes twice that for it). Left alone
// this grows to 4 MiB, which count towards a container's memory; and as a writer is woken only when a third of it is free,
// a client that reads slowly seems to have stopped. Answers of 10 MiB take a tenth longer for it, others do not.
const sendBuffer = 64 << 10

// clientConn is a client's connection. Who is behind it can't change while it lasts.
type clientConn struct {
	net.Conn
	mu     sync.Mutex
	latest *lookup // of the caller; nil before the first
}

// lookup is a question to tailscaled, and its answer.
type lookup struct {
	done chan struct{} // closed once who and err are set
	who  identity
	err  error
}

// connKey is the context key of a request's *clientConn.
type connKey struct{}

// withConn is an http.Server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	return context.WithValue(ctx, connKey{}, &clientConn{Conn: conn})
}

// connOf returns the connection that r came over.
func connOf(r *http.Request) *clientConn { return r.Context().Value(connKey{}).(*clientConn) }

// caller returns the look-up of who is behind c. It begins one with whoIs unless there is an answer, or one is under way:
// one for each request would cost most of the proxy's throughput.
func (c *clientConn) caller(whoIs func(ctx context.Context, addr string) (identity, error)) *lookup {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.latest != nil && (c.latest.pending() || c.latest.err == nil) {
		return c.latest
	}
	l := &lookup{done: make(chan struct{})}
	c.latest = l
	go func() {
		defer close(l.done)
		l.who, l.err = whoIs(context.Background(), c.RemoteAddr().String())
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

// require waits for the answer, and refuses callers that tailscaled does not know.
func (l *lookup) require(ctx context.Context) error {
	select {
	case <-l.done:
	case <-ctx.Done():
		return departure(ctx)
	}
	switch {
	case l.err != nil:
		return errCallerPending
	case l.who == identity{}:
		return errUnknownCaller
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

// watchHangup calls gone when the peer of c closes or resets the connection, until stop is called. net/http
// notices that only for requests whose body it has read to the end; a queued request has its body still in the
// socket, in front of the FIN. So the kernel is asked for the connection's state whenever the poller reports a change.
// Nobody may read c meanwhile. Other systems than Linux, and connections that are no sockets, notice it in their turn.
func (c *clientConn) watchHangup(gone func()) (stop func()) {
	socket, ok := c.Conn.(syscall.Conn)
	if !ok || runtime.GOOS != "linux" {
		return func() {}
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return func() {}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if raw.Read(peerClosed) == nil {
			gone()
		}
	}()
	return func() {
		c.SetReadDeadline(time.Unix(1, 0)) // ends raw.Read
		<-done
		c.SetReadDeadline(time.Time{})
	}
}

// peerClosed reports whether the TCP connection fd is no longer open on both ends.
func peerClosed(fd uintptr) bool {
	const tcpInfo, established = 11, 1 // linux/tcp.h, linux/tcp_states.h
	// The option's value is a struct tcp_info; a short buffer gets its beginning, and the first
	// byte (the lowest on the little-endian machines we build for) is the state.
	info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpInfo)
	return err == nil && info&0xff != established
}
