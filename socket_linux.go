package main

import (
	"net"
	"syscall"
	"time"
)

// tcpEstablished is the state of a connection whose both ends are open (linux/tcp_states.h).
const tcpEstablished = 1

// watchHangup calls gone when the peer of conn closes or resets the connection, until stop is
// called. net/http notices that only for requests whose body it has read to the end; a queued
// request has its body still in the socket, in front of the FIN. So the kernel is asked for the
// connection's state whenever the poller reports a change. Nobody may read conn meanwhile.
func watchHangup(conn net.Conn, gone func()) (stop func()) {
	raw, err := rawConn(conn)
	if err != nil {
		return func() {} // not a socket: found when its body is read
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if raw.Read(peerClosed) == nil {
			gone()
		}
	}()
	return func() {
		conn.SetReadDeadline(time.Unix(1, 0)) // ends raw.Read
		<-done
		conn.SetReadDeadline(time.Time{})
	}
}

// peerClosed reports whether the TCP connection fd is no longer open on both ends.
func peerClosed(fd uintptr) bool {
	// The option's value is a struct tcp_info; a short buffer gets its beginning, and the first
	// byte (the lowest on the little-endian machines we build for) is the state.
	info, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_INFO)
	return err == nil && info&0xff != tcpEstablished
}

// setUserTimeout has the kernel give a connection up when sent bytes stay unacknowledged for d,
// which TCP keep-alives, sent only on idle connections, do not notice (RFC 5482).
func setUserTimeout(conn net.Conn, d time.Duration) {
	const tcpUserTimeout = 18 // missing in package syscall
	if raw, err := rawConn(conn); err == nil {
		raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(d.Milliseconds()))
		})
	}
}

// rawConn returns the socket below conn.
func rawConn(conn net.Conn) (syscall.RawConn, error) {
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return nil, syscall.ENOTSOCK
	}
	return sc.SyscallConn()
}
