//go:build faults

package faults

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
)

// A rawUpstream does to its connections what no well-behaved server does.
type rawUpstream struct {
	s        *scene
	listener net.Listener
	healthy  atomic.Bool // serves /plain and nothing else
	requests atomic.Int32

	mu    sync.Mutex
	conns map[net.Conn]bool
}

// A peer is a connection that the proxy opened to a rawUpstream.
type peer struct {
	*net.TCPConn
	up *rawUpstream
	r  *bufio.Reader
	n  int // 1 for the upstream's first connection
}

// upstream runs a rawUpstream: harm has each connection that is opened, which is
// closed when it returns.
func (s *scene) upstream(harm func(p *peer)) *rawUpstream {
	s.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	u := &rawUpstream{s: s, listener: listener, conns: map[net.Conn]bool{}}
	s.mend = func() { u.healthy.Store(true) }
	s.hangUp = u.hangUp
	s.Cleanup(func() { listener.Close(); u.hangUp() })
	go u.serve(harm)
	return u
}

// url is for the proxy's configuration.
func (u *rawUpstream) url() string { return "http://" + u.listener.Addr().String() }

func (u *rawUpstream) serve(harm func(p *peer)) {
	for n := 1; ; n++ {
		conn, err := u.listener.Accept()
		if err != nil {
			return // closed
		}
		u.mu.Lock()
		u.conns[conn] = true
		u.mu.Unlock()
		p := &peer{TCPConn: conn.(*net.TCPConn), up: u, r: bufio.NewReader(conn), n: n}
		go func() {
			defer u.forget(conn)
			if u.healthy.Load() {
				p.request() // serves what is plain
				return
			}
			harm(p)
		}()
	}
}

func (u *rawUpstream) forget(conn net.Conn) {
	u.mu.Lock()
	defer u.mu.Unlock()
	conn.Close()
	delete(u.conns, conn)
}

// hangUp closes all connections.
func (u *rawUpstream) hangUp() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for conn := range u.conns {
		conn.Close()
	}
}

// got checks how many requests, plain ones aside, have reached the upstream.
func (u *rawUpstream) got(want int) {
	u.s.Helper()
	if got := int(u.requests.Load()); got != want {
		u.s.Errorf("the upstream got %d requests, want %d", got, want)
	}
}

// head reads a request without its body, and answers plain ones on the way. It
// returns nil when the proxy closes the connection.
func (p *peer) head() *http.Request {
	for {
		req, err := http.ReadRequest(p.r)
		if err != nil {
			return nil
		}
		if req.URL.Path != "/plain" {
			p.up.requests.Add(1)
			return req
		}
		p.say("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain")
	}
}

// request is head, and reads the body too.
func (p *peer) request() *http.Request {
	req := p.head()
	if req != nil {
		io.Copy(io.Discard, req.Body)
	}
	return req
}

// say sends text; to a proxy that has left, nothing.
func (p *peer) say(text string) bool {
	_, err := io.WriteString(p.TCPConn, text)
	return err == nil
}

// reset ends the connection with a RST.
func (p *peer) reset() error {
	p.SetLinger(0)
	return p.Close()
}

// hold waits until the proxy closes the connection.
func (p *peer) hold() error {
	_, err := io.Copy(io.Discard, p.r)
	return err
}

// finish closes the sending side alone, and then waits for the proxy.
func (p *peer) finish() error {
	p.CloseWrite()
	return p.hold()
}

// chunked begins an answer, with its first chunk.
func chunked(first string) string {
	return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(first)
}

func chunk(text string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(text), text) }

// event is one server-sent event.
const event = "event: ping\ndata: {\"type\":\"ping\"}\n\n"

// header is a header field of n bytes.
func header(name string, n int) string {
	return name + ": " + strings.Repeat("x", n-len(name)-len(": \r\n")) + "\r\n"
}
