package proxytest

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
)

// A Client is one connection that speaks HTTP/1.1 in requests that the caller has written, and does little else.
type Client struct {
	net.Conn
	in *bufio.Reader
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
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, fmt.Errorf("reading an answer: %w", err)
	}
	return resp, nil
}
