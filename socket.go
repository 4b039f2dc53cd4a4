package main

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// What is asked of the kernel, and package net has no words for. What takes a net.Conn does nothing on one that is no
// socket, nor on other systems than Linux. socketOwner fails there, so there is no PROXY protocol.

// onSocket calls f with the descriptor of conn, if there is one.
func onSocket(conn net.Conn, f func(fd int)) {
	if socket, ok := conn.(syscall.Conn); ok && runtime.GOOS == "linux" {
		if raw, err := socket.SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { f(int(fd)) })
		}
	}
}

// hasUnread reports whether the peer has sent something that nobody has come to read yet.
func hasUnread(conn net.Conn) (yes bool) {
	onSocket(conn, func(fd int) {
		n, _, _ := syscall.Recvfrom(fd, make([]byte, 1), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		yes = n > 0
	})
	return yes
}

// setBufferLock turns the kernel's autotuning of a socket's buffers off (locked) or on. Setting a listener's receive buffer
// turns it off too, and limits for good what its connections can offer their peers (window scale 0), unless it is turned on
// again here. Linux before 5.14 can't.
func setBufferLock(fd int, locked bool) {
	const option, both = 72, 3 // SO_BUF_LOCK of asm-generic/socket.h, SOCK_SNDBUF_LOCK | SOCK_RCVBUF_LOCK
	mask := 0
	if locked {
		mask = both
	}
	syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, option, mask)
}

// setReceiveBuffer has the kernel take so many bytes ahead of its readers, where it has offered its peer less.
func setReceiveBuffer(conn net.Conn, bytes int) {
	const windowClamp = 10 // TCP_WINDOW_CLAMP of linux/tcp.h
	onSocket(conn, func(fd int) {
		syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_RCVBUF, bytes)
		syscall.SetsockoptInt(fd, syscall.IPPROTO_TCP, windowClamp, bytes)
	})
}

// fileOwner returns the user who owns a file.
func fileOwner(path string) (uid uint32, err error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Uid, nil
}

// socketOwner returns the user whose socket, on this machine, is at local and connected to remote; net.ErrClosed if it is
// on its way out, and nobody's any more.
func socketOwner(local, remote netip.AddrPort) (uid uint32, err error) {
	table := "/proc/net/tcp"
	if local.Addr().Is6() {
		table = "/proc/net/tcp6"
	}
	lines, err := os.ReadFile(table)
	if err != nil {
		return 0, err
	}
	ends := procAddr(local) + " " + procAddr(remote) + " "
	_, row, found := strings.Cut(string(lines), ": "+ends) // after the row's number
	field := strings.Fields(row[:min(len(row), 200)])
	if !found || len(field) < 5 { // state, queues, timer, retransmissions, user
		return 0, fmt.Errorf("%s has no socket from %v to %v", table, local, remote)
	}
	if field[0] != "01" { // TCP_ESTABLISHED
		return 0, net.ErrClosed
	}
	number, err := strconv.ParseUint(field[4], 10, 32)
	return uint32(number), err
}

// procAddr formats an address as the kernel does there: words of 32 bits as they lie in memory.
func procAddr(addr netip.AddrPort) (s string) {
	for word := range slices.Chunk(addr.Addr().AsSlice(), 4) {
		s += fmt.Sprintf("%08X", binary.NativeEndian.Uint32(word))
	}
	return fmt.Sprintf("%s:%04X", s, addr.Port())
}

// watchHangup calls gone when the peer of conn closes its end or resets the connection, until stop, which clears conn's
// read deadline. Nobody may read conn meanwhile. net/http would notice only after the end of the request's body, which is
// still in the socket here, in front of the FIN: so the kernel is asked for the connection's state whenever the poller
// reports a change.
func watchHangup(conn net.Conn, gone func()) (stop func()) {
	socket, ok := conn.(syscall.Conn)
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
		conn.SetReadDeadline(time.Unix(1, 0)) // ends raw.Read
		<-done
		conn.SetReadDeadline(time.Time{})
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
