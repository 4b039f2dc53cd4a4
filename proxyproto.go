package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

const (
	// proxyHeaderTime is how long a connection may take to send its PROXY header.
	proxyHeaderTime = 5 * time.Second
	// maxProxyLine and maxProxyHeader are how long headers of version 1 and 2 may be, in bytes. Version 2 would allow for
	// 64 KiB of extensions, of which tailscaled sends none.
	maxProxyLine   = 107
	maxProxyHeader = 1 << 10
)

// serviceListener accepts the connections that tailscaled makes for the clients of a Tailscale Service (tailscale serve
// --proxy-protocol): each begins with a PROXY header, which names the client. They count among the others.
//
// The header is a claim of identity, and loopback is open to many. So it is taken from tailscaled alone, see
// [serviceListener.vouch].
type serviceListener struct {
	net.Listener
	clients *clientListener
	daemon  func() (uid uint32, err error) // the user that tailscaled runs as
	whoIs   func(ctx context.Context, addr string) (identity, error)
	refused io.Writer // is told of dropped connections, unless the peer has closed them
}

// Accept implements net.Listener.
func (l *serviceListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	c := &clientConn{Conn: conn}
	c.firstRead = func(p []byte) (int, error) { return l.readHeader(c, p) }
	return l.clients.admit(c)
}

// readHeader takes the PROXY header from the beginning of c, into p, and leaves the n bytes there that follow it. A
// connection that has none, or not from tailscaled, ends as if the client had left.
func (l *serviceListener) readHeader(c *clientConn, p []byte) (n int, err error) {
	c.SetReadDeadline(time.Now().Add(proxyHeaderTime))
	var size, more int
	for size == 0 && err == nil {
		if more, err = c.Conn.Read(p[n:]); err == nil {
			n += more
			c.claimed, size, err = parseProxyHeader(p[:n])
		}
	}
	if err == nil {
		err = l.vouch(c)
	}
	if err != nil {
		if !errors.Is(err, net.ErrClosed) { // by us, for a newer one, or by the peer
			fmt.Fprintf(l.refused, "connection to proxy.proxy_protocol_addr dropped: %v", err)
		}
		return 0, io.EOF
	}
	return copy(p, p[size:n]), nil
}

// vouch returns nil if c comes from tailscaled, and on behalf of its own serve.
//
// So its other end must belong to the user who owns tailscaled's socket. That is not enough on 127.0.0.1 and ::1: what
// tailnet peers send to any port of the node, a userspace tailscaled forwards there itself, and only WhoIs can tell. That
// takes it 0.2 s under a lock if the answer is no, as it should be: better listen on another address of 127.0.0.0/8.
func (l *serviceListener) vouch(c *clientConn) error {
	peer, here := addrPortOf(c.RemoteAddr()), addrPortOf(c.LocalAddr())
	daemon, err := l.daemon()
	if err != nil {
		return err
	}
	if owner, err := socketOwner(peer, here); err != nil || owner != daemon {
		return cmp.Or(err, fmt.Errorf("it is not tailscaled's: it belongs to user %d, tailscaled's socket to user %d", owner, daemon))
	}
	if here.Addr() != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && here.Addr() != netip.IPv6Loopback() {
		return nil
	}
	who, err := l.whoIs(context.Background(), peer.String())
	if err == nil && who != (identity{}) {
		err = fmt.Errorf("it is a forgery by %s (%s), who connected directly and claims to be %v", who.node, who.user, c.claimed)
	}
	return err
}

// addrPortOf returns a TCP address in a form that can be compared.
func addrPortOf(addr net.Addr) netip.AddrPort {
	ap := addr.(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// errNoProxyHeader refuses what does not begin with a PROXY header.
var errNoProxyHeader = errors.New("it does not begin with a PROXY header: give tailscale serve --proxy-protocol=1")

// The beginnings of a PROXY header of version 1 and 2.
var proxyLine, proxySignature = []byte("PROXY "), []byte("\r\n\r\n\x00\r\nQUIT\n")

// parseProxyHeader reads the header of the PROXY protocol (haproxy.org, version 1 or 2) that b begins with. It returns the
// client's address, which is not valid if the header names none, and the size of the header: 0 if there is more to come.
func parseProxyHeader(b []byte) (client netip.AddrPort, size int, err error) {
	begins := func(with []byte) bool { return bytes.HasPrefix(b, with) || bytes.HasPrefix(with, b) }
	switch {
	case begins(proxyLine):
		return parseProxyLine(b)
	case begins(proxySignature):
		return parseProxyBinary(b)
	}
	return client, 0, errNoProxyHeader
}

// parseProxyLine reads a header of version 1, a line of text.
func parseProxyLine(b []byte) (client netip.AddrPort, size int, err error) {
	line, _, whole := strings.Cut(string(b[:min(len(b), maxProxyLine)]), "\n")
	if !whole && len(b) < maxProxyLine {
		return client, 0, nil
	}
	line, ended := strings.CutSuffix(line, "\r")
	field := strings.Split(line, " ")
	if !whole || !ended {
		return client, 0, errNoProxyHeader
	}
	size = len(line) + len("\r\n")
	if field[1] == "UNKNOWN" {
		return client, size, nil
	}
	if len(field) != 6 {
		return client, 0, errNoProxyHeader
	}
	client, valid := parseProxyAddr(field[1], field[2], field[4])
	if _, other := parseProxyAddr(field[1], field[3], field[5]); !valid || !other {
		return client, 0, errNoProxyHeader
	}
	return client, size, nil
}

// parseProxyAddr reads an address and a port as they stand in a header of version 1.
func parseProxyAddr(family, host, port string) (addr netip.AddrPort, ok bool) {
	ip, err := netip.ParseAddr(host)
	number, portErr := strconv.ParseUint(port, 10, 16)
	ok = err == nil && portErr == nil && strconv.FormatUint(number, 10) == port && ip.Zone() == "" &&
		(family == "TCP4" && ip.Is4() || family == "TCP6" && ip.Is6())
	return netip.AddrPortFrom(ip.Unmap(), uint16(number)), ok
}

// parseProxyBinary reads a header of version 2.
func parseProxyBinary(b []byte) (client netip.AddrPort, size int, err error) {
	const fixed, version2, local, tcp4, tcp6 = 16, 2 << 4, 0, 0x11, 0x21
	if len(b) < fixed {
		return client, 0, nil
	}
	command, kind := b[12]&^version2, b[13]
	size = fixed + int(binary.BigEndian.Uint16(b[14:]))
	from := b[fixed:]
	switch {
	case b[12]&0xf0 != version2 || command > 1 || kind>>4 > 3 || kind&0xf > 2 || size > maxProxyHeader:
		return client, 0, errNoProxyHeader
	case command != local && (kind == tcp4 && size < fixed+12 || kind == tcp6 && size < fixed+36):
		return client, 0, errNoProxyHeader
	case len(b) < size:
		return client, 0, nil
	case command == local: // tailscaled itself
	case kind == tcp4:
		client = netip.AddrPortFrom(netip.AddrFrom4([4]byte(from)), binary.BigEndian.Uint16(from[8:]))
	case kind == tcp6:
		client = netip.AddrPortFrom(netip.AddrFrom16([16]byte(from)).Unmap(), binary.BigEndian.Uint16(from[32:]))
	}
	return client, size, nil
}
