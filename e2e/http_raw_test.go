package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// rawConn is a connection for requests that net/http's client is too polite for.
type rawConn struct {
	net.Conn
	r *bufio.Reader
}

func dial(t testing.TB, p *proxytest.Proxy) *rawConn {
	t.Helper()
	conn, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(40 * time.Second)) // only to keep a failing test from hanging
	return &rawConn{conn, bufio.NewReader(conn)}
}

// send writes lines joined by CRLF: an empty one ends the header.
func (c *rawConn) send(t testing.TB, lines ...string) {
	t.Helper()
	if _, err := io.WriteString(c, strings.Join(lines, "\r\n")); err != nil {
		t.Fatal(err)
	}
}

// answer reads one answer to a request with this method.
func (c *rawConn) answer(t testing.TB, method string) answer {
	t.Helper()
	resp, err := http.ReadResponse(c.r, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("reading the answer: %v", err)
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading the answer's body: %v", err)
	}
	return answer{resp, string(body)}
}

// checkClosed checks that the proxy sends nothing more and closes.
func (c *rawConn) checkClosed(t testing.TB) {
	t.Helper()
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		t.Errorf("after the answer came %q, %v; want the connection closed", rest, err)
	}
}

// exchange sends one raw request on a connection of its own.
func exchange(t testing.TB, p *proxytest.Proxy, lines ...string) answer {
	t.Helper()
	c := dial(t, p)
	c.send(t, lines...)
	method, _, _ := strings.Cut(lines[0], " ")
	return c.answer(t, method)
}

// rawUpstream serves each connection with serve, for what no well-behaved server
// does. serve gets the connection's number, 1 for the first; the connection is
// closed when it returns.
func rawUpstream(t testing.TB, serve func(n int, conn net.Conn, r *bufio.Reader)) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for n := 1; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			go func() {
				defer conn.Close()
				serve(n, conn, bufio.NewReader(conn))
			}()
		}
	}()
	return listener.Addr().String()
}

// closedPort returns an address of 127.0.0.1 on which nobody listens, nor can anyone else take it: a port that was
// merely free a moment ago is soon another test's.
func closedPort(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", name.(*syscall.SockaddrInet4).Port)
}
