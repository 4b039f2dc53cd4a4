//go:build faults

package faults

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A rawClient is a connection to the proxy over which anything can be sent.
type rawClient struct {
	*net.TCPConn
	s *scene
	r *bufio.Reader
}

// dial opens a connection to the proxy, which is closed with those of the upstream.
func (s *scene) dial() *rawClient {
	s.Helper()
	conn, err := net.Dial("tcp", s.proxy.Addr())
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { conn.Close() })
	others := s.hangUp
	s.hangUp = func() { conn.Close(); others() }
	conn.SetDeadline(time.Now().Add(2 * proxytest.Timeout)) // only to keep a failing test from hanging
	return &rawClient{TCPConn: conn.(*net.TCPConn), s: s, r: bufio.NewReader(conn)}
}

// dialAndSay opens a connection and sends text.
func (s *scene) dialAndSay(text string) *rawClient {
	s.Helper()
	c := s.dial()
	c.say(text)
	return c
}

// say sends text, as far as the proxy takes it: what it turns away it need not have
// read to the end.
func (c *rawClient) say(text string) { io.WriteString(c.TCPConn, text) }

// answer reads one answer.
func (c *rawClient) answer() answer {
	c.s.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.s.Fatalf("the client got no answer: %v", err)
	}
	a := answer{Response: resp}
	a.body, a.err = io.ReadAll(resp.Body)
	return a
}

// closed checks that nothing more comes, and that the connection is closed.
func (c *rawClient) closed() {
	c.s.Helper()
	rest, err := io.ReadAll(c.r)
	if len(rest) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.s.Errorf("the client got %.300q more (%v), want the end of the connection", rest, err)
	}
}

// turnedAway checks that net/http itself has refused what was sent, and closed the
// connection: that counts nowhere.
func (c *rawClient) turnedAway(status int) {
	c.s.Helper()
	a := c.answer()
	if a.StatusCode != status || !a.Close || a.Header.Get("X-Proxy-Request-Id") != "" {
		c.s.Errorf("the client got status %d and %.300q, want %d of net/http's own and the end of the connection", a.StatusCode, a.body, status)
	}
	c.closed()
}

// departures are the ways in which a client can vanish that look different to the proxy.
var departures = []struct {
	name  string
	leave func(c *rawClient)
}{
	{"FIN", (*rawClient).finish},
	{"RST", (*rawClient).reset},
}

// finish closes the sending side alone, which is all that the proxy can see of a
// client that is gone: so it can be seen that the client is not answered.
func (c *rawClient) finish() {
	c.s.Helper()
	c.CloseWrite()
	rest, _ := io.ReadAll(c.r)
	if text := string(rest); strings.HasPrefix(text, "HTTP/") || strings.HasSuffix(text, "0\r\n\r\n") {
		c.s.Errorf("the client has left, and got %.300q", text)
	}
}

// reset ends the connection with a RST.
func (c *rawClient) reset() {
	c.SetLinger(0)
	c.Close()
}

// An echo is an upstream that answers with what it was asked: method, target and body.
type echo struct {
	*rawUpstream

	mu    sync.Mutex
	wire  strings.Builder // all that came
	heads []*http.Request
}

// echo runs an upstream that answers with what it was asked.
func (s *scene) echo() *echo {
	e := new(echo)
	e.rawUpstream = s.upstream(e.serve)
	return e
}

func (e *echo) serve(p *peer) {
	p.r = bufio.NewReader(io.TeeReader(p.TCPConn, e))
	for req := p.head(); req != nil; req = p.head() {
		body, err := io.ReadAll(req.Body)
		if err != nil {
			return
		}
		e.mu.Lock()
		e.heads = append(e.heads, req)
		e.mu.Unlock()
		text := fmt.Sprintf("%s %s %s", req.Method, req.RequestURI, body)
		p.say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(text), text))
	}
}

// Write takes what comes over a connection.
func (e *echo) Write(b []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.wire.Write(b)
}

var (
	// unclean are the line endings that receivers understand differently: CR or LF
	// alone, and those that a folded line follows.
	unclean = regexp.MustCompile(`\r[^\n]|[^\r]\n|\r\n[ \t]`)
	// framing are the headers that say where a body ends.
	framing = regexp.MustCompile(`(?im)^(content-length|transfer-encoding):`)
)

// only checks that one request has reached the upstream, without anything that
// another receiver could read as more than one, and returns it.
func (e *echo) only() *http.Request {
	e.s.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.heads) != 1 {
		e.s.Fatalf("the upstream got %d requests, want 1: %q", len(e.heads), e.wire.String())
	}
	wire, req := e.wire.String(), e.heads[0]
	if unclean.MatchString(wire) || len(framing.FindAllString(wire, -1)) > 1 || req.Host != e.listener.Addr().String() {
		e.s.Errorf("the upstream got %q, want one clean request to itself", wire)
	}
	return req
}

// idle reports whether the upstream has no connection.
func (u *rawUpstream) idle() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.conns) == 0
}
