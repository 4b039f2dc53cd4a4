package main

import (
	"net"
	"syscall"
	"testing"
)

// TestReceiveBuffers: under a memory limit that was given, the kernel takes little of an upload ahead, and more of a large one,
// on one connection in 32.
func TestReceiveBuffers(t *testing.T) {
	for limit, want := range map[string]struct{ accepted, widened int }{"96MiB": {receiveBuffer, largeReceiveBuffer}, "": {}} {
		t.Setenv("GOMEMLIMIT", limit)
		const connections = 2 * wideShare
		l := newClientListener(must(listen("127.0.0.1:0"))[0], connections)
		defer l.Close()
		wide := 0
		for range connections {
			defer must(net.Dial("tcp", l.Addr().String())).Close()
			conn := must(l.Accept())
			defer conn.Close()
			before := receiveBufferOf(conn.(*clientConn).Conn)
			conn.(*clientConn).widen()
			after := receiveBufferOf(conn.(*clientConn).Conn)
			if limit == "" {
				want.accepted, want.widened = before/2, before/2 // the kernel's choice, which stays
			}
			// It takes twice that for what comes with it.
			holds(t, before == 2*want.accepted && (after == before || after == 2*want.widened), "%q: %d bytes, then %d; want %+v", limit, before/2, after/2, want)
			if after != before {
				wide++
			}
		}
		most := connections/wideShare + 1
		holds(t, limit == "" || wide == most, "%d of %d connections have a large buffer, want %d", wide, connections, most)
	}
}

// receiveBufferOf returns what the kernel takes for a socket's receive buffer, in bytes.
func receiveBufferOf(conn net.Conn) (n int) {
	onSocket(conn, func(fd int) { n, _ = syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF) })
	return n
}
