package proxytest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// Event is one server-sent event.
const Event = "event: ping\ndata: {\"type\":\"ping\"}\n\n"

// Chunked begins an answer of HTTP/1.1, with its first chunk.
func Chunked(first string) string {
	return "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + Chunk(first)
}

// Chunk is one chunk more.
func Chunk(text string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(text), text) }

// Whole is a whole answer of HTTP/1.1.
func Whole(text string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
}

// HeaderLine is a header line of n bytes.
func HeaderLine(name string, n int) string {
	return name + ": " + strings.Repeat("x", n-len(name)-len(": \r\n")) + "\r\n"
}

// An Upstream does to its connections what no well-behaved server does.
type Upstream struct {
	URL      string
	Env      string       // in which the proxy trusts it, if it speaks TLS
	Requests atomic.Int32 // those to the plain path aside

	s       *Scene
	healthy atomic.Bool // serves, and does no harm any more
	mu      sync.Mutex
	conns   map[net.Conn]bool // that are open
}

// A Peer is a connection that the proxy opened to an [Upstream].
type Peer struct {
	*net.TCPConn
	N  int // 1 for the upstream's first connection
	R  *bufio.Reader
	up *Upstream
}

// Upstream runs an [Upstream]: harm has each connection that is opened, which is closed when it returns.
func (s *Scene) Upstream(harm func(p *Peer)) *Upstream {
	s.Helper()
	return s.UpstreamAt("127.0.0.1:0", harm)
}

// UpstreamAt is Upstream at this address.
func (s *Scene) UpstreamAt(addr string, harm func(p *Peer)) *Upstream {
	s.Helper()
	return s.upstream(Must(net.Listen("tcp", addr))(s), "", func(u *Upstream, n int, conn net.Conn) {
		p := &Peer{TCPConn: conn.(*net.TCPConn), N: n, R: bufio.NewReader(conn), up: u}
		if u.healthy.Load() {
			p.Request() // serves what is plain
			return
		}
		harm(p)
	})
}

// upstream has serve serve each connection that is opened, which is closed when it returns.
func (s *Scene) upstream(listener net.Listener, env string, serve func(u *Upstream, n int, conn net.Conn)) *Upstream {
	scheme := "http://"
	if env != "" {
		scheme = "https://"
	}
	u := &Upstream{s: s, URL: scheme + listener.Addr().String(), Env: env, conns: map[net.Conn]bool{}}
	s.Plain, s.Mend = true, func() { u.healthy.Store(true) }
	s.atHangUp(u.HangUp)
	s.Cleanup(func() { listener.Close(); u.HangUp() })
	go func() {
		for n := 1; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			u.mu.Lock()
			u.conns[conn] = true
			u.mu.Unlock()
			go func() {
				serve(u, n, conn)
				u.mu.Lock()
				defer u.mu.Unlock()
				conn.Close()
				delete(u.conns, conn)
			}()
		}
	}()
	return u
}

// HangUp cuts all connections.
func (u *Upstream) HangUp() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for conn := range u.conns {
		conn.Close()
	}
}

// Connected returns the number of connections.
func (u *Upstream) Connected() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.conns)
}

// Got checks how many requests, those to the plain path aside, have reached the upstream.
func (u *Upstream) Got(want int) {
	u.s.Helper()
	if got := int(u.Requests.Load()); got != want {
		u.s.Errorf("the upstream got %d requests, want %d", got, want)
	}
}

// Reached waits until n requests have reached the upstream.
func (u *Upstream) Reached(n int32) {
	u.s.Helper()
	Eventually(u.s.T, fmt.Sprint(n, " requests at the upstream"), func() bool { return u.Requests.Load() >= n })
}

// Head reads a request without its body, and answers plain ones on the way. It returns nil when the proxy closes the connection.
func (p *Peer) Head() *http.Request {
	for {
		req, err := http.ReadRequest(p.R)
		if err != nil {
			return nil
		}
		if req.URL.Path != fakeanthropic.PlainPath {
			p.up.Requests.Add(1)
			return req
		}
		p.Say(Whole("plain"))
	}
}

// Request is Head, and reads the body too.
func (p *Peer) Request() *http.Request {
	req := p.Head()
	if req != nil {
		io.Copy(io.Discard, req.Body)
	}
	return req
}

// Say sends text; to a proxy that has left, nothing.
func (p *Peer) Say(text string) bool {
	_, err := io.WriteString(p.TCPConn, text)
	return err == nil
}

// Reset ends the connection with a RST.
func (p *Peer) Reset() error {
	p.SetLinger(0)
	return p.Close()
}

// Hold waits until the proxy closes the connection.
func (p *Peer) Hold() error {
	_, err := io.Copy(io.Discard, p.R)
	return err
}

// Finish closes the sending side alone, and then waits for the proxy.
func (p *Peer) Finish() error {
	p.CloseWrite()
	return p.Hold()
}

// An Echo is an upstream that answers with what it was asked: method, target and body.
type Echo struct {
	*Upstream

	mu    sync.Mutex
	wire  strings.Builder // all that came
	heads []*http.Request
}

// Echo runs an [Echo].
func (s *Scene) Echo() *Echo {
	s.Helper()
	e := new(Echo)
	e.Upstream = s.Upstream(e.serve)
	return e
}

func (e *Echo) serve(p *Peer) {
	p.R = bufio.NewReader(io.TeeReader(p.TCPConn, e))
	for req := p.Head(); req != nil; req = p.Head() {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		e.mu.Lock()
		e.heads = append(e.heads, req)
		e.mu.Unlock()
		p.Say(Whole(fmt.Sprintf("%s %s %s", req.Method, req.RequestURI, body)))
	}
}

// Write takes what comes over a connection.
func (e *Echo) Write(b []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.wire.Write(b)
}

var (
	// unclean are the line endings that receivers understand differently: CR or LF alone, and those that a folded line follows.
	unclean = regexp.MustCompile(`\r[^\n]|[^\r]\n|\r\n[ \t]`)
	// framing are the headers that say where a body ends.
	framing = regexp.MustCompile(`(?im)^(content-length|transfer-encoding):`)
)

// Only checks that one request has reached the upstream, without anything that another receiver could read as more than one, and
// returns it.
func (e *Echo) Only() *http.Request {
	e.s.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.heads) != 1 {
		e.s.Fatalf("the upstream got %d requests, want 1: %q", len(e.heads), e.wire.String())
	}
	wire, req := e.wire.String(), e.heads[0]
	if unclean.MatchString(wire) || len(framing.FindAllString(wire, -1)) > 1 || "http://"+req.Host != e.URL {
		e.s.Errorf("the upstream got %q, want one clean request to itself", wire)
	}
	return req
}
