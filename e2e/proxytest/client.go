package proxytest

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"
)

// A Client is one connection over which anything can be sent.
type Client struct {
	net.Conn
	R *bufio.Reader
}

// Dial opens a connection that lasts as long as ctx, with TLS if config is not nil.
func Dial(ctx context.Context, addr string, config *tls.Config) (*Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if config != nil {
		conn = tls.Client(conn, config)
	}
	context.AfterFunc(ctx, func() { conn.Close() })
	return &Client{conn, bufio.NewReader(conn)}, nil
}

// Send sends a request and waits for the headers of its answer. Whoever sends another has to have read all of the answer's body.
func (c *Client) Send(request []byte) (*http.Response, error) {
	if _, err := c.Write(request); err != nil {
		return nil, fmt.Errorf("sending a request: %w", err)
	}
	resp, err := http.ReadResponse(c.R, nil)
	if err != nil {
		return nil, fmt.Errorf("reading an answer: %w", err)
	}
	return resp, nil
}

// A RawClient is a [Client] of a scene's proxy.
type RawClient struct {
	*Client
	s *Scene
}

// Dial opens a connection to the proxy, which is closed with those of the upstream.
func (s *Scene) Dial() *RawClient {
	s.Helper()
	c := Must(Dial(context.Background(), s.Proxy.Addr(), nil))(s)
	s.Cleanup(func() { c.Close() })
	s.atHangUp(func() { c.Close() })
	c.SetDeadline(time.Now().Add(2 * Timeout)) // only to keep a failing test from hanging
	return &RawClient{c, s}
}

// Say opens a connection and sends text.
func (s *Scene) Say(text string) *RawClient {
	s.Helper()
	c := s.Dial()
	c.Say(text)
	return c
}

// Lines are lines of HTTP; the one after an empty one is the body.
func Lines(lines ...string) string { return strings.Join(lines, "\r\n") }

// TCP is the connection itself.
func (c *RawClient) TCP() *net.TCPConn { return c.Conn.(*net.TCPConn) }

// Say sends text, as far as the proxy takes it: what it turns away it need not have read to the end.
func (c *RawClient) Say(text string) { io.WriteString(c, text) }

// Answer reads the answer to a request with a body to its end.
func (c *RawClient) Answer() Answer { c.s.Helper(); return c.AnswerTo("") }

// AnswerTo reads the answer to a request with this method.
func (c *RawClient) AnswerTo(method string) Answer {
	c.s.Helper()
	resp, err := http.ReadResponse(c.R, &http.Request{Method: method})
	if err != nil {
		c.s.Fatalf("the client got no answer: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	return Answer{resp, string(body), err}
}

// Closed checks that nothing more comes, and that the connection is closed.
func (c *RawClient) Closed() {
	c.s.Helper()
	rest, err := io.ReadAll(c.R)
	if len(rest) > 0 || err != nil && !errors.Is(err, syscall.ECONNRESET) {
		c.s.Errorf("the client got %.300q more (%v), want the end of the connection", rest, err)
	}
}

// TurnedAway checks that net/http itself has refused what was sent, and closed the connection: that counts nowhere.
func (c *RawClient) TurnedAway(status int) {
	c.s.Helper()
	a := c.Answer()
	if a.StatusCode != status || !a.Close || a.Header.Get("X-Proxy-Request-Id") != "" {
		c.s.Errorf("the client got status %d and %.300q, want %d of net/http's own and the end of the connection", a.StatusCode, a.Text, status)
	}
	c.Closed()
}

// Finish closes the sending side alone, which is all that the proxy can see of a client that is gone: so it can be seen that the
// client is not answered.
func (c *RawClient) Finish() {
	c.s.Helper()
	c.TCP().CloseWrite()
	rest, _ := io.ReadAll(c.R)
	if text := string(rest); strings.HasPrefix(text, "HTTP/") || strings.HasSuffix(text, "0\r\n\r\n") {
		c.s.Errorf("the client has left, and got %.300q", text)
	}
}

// Reset ends the connection with a RST.
func (c *RawClient) Reset() {
	c.TCP().SetLinger(0)
	c.Close()
}
