package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestProxyHeader: what tailscaled writes, what the protocol has besides, and what is refused. FuzzProxyProtocol in e2e has the rest.
func TestProxyHeader(t *testing.T) {
	const signature = "\r\n\r\n\x00\r\nQUIT\n"
	four, six := "\x64\x40\x00\x07\x64\x40\x00\x01\xa0\x28\x1f\x92", "\xfd\x7a\x11\x5c\xa1\xe0"+strings.Repeat("\x00", 9)+"\x07"+strings.Repeat("\x01", 16)+"\xa0\x28\x1f\x92"
	const refused = "refused"
	for header, want := range map[string]string{ // the client, "" if it names none
		"PROXY TCP4 100.64.0.7 100.64.0.1 41000 8082\r\n":               "100.64.0.7:41000",
		"PROXY TCP6 fd7a:115c:a1e0::7 fd7a:115c:a1e0::1 41000 8082\r\n": "[fd7a:115c:a1e0::7]:41000",
		"PROXY TCP6 ::ffff:100.64.0.7 ::1 0 65535\r\n":                  "100.64.0.7:0",
		"PROXY UNKNOWN\r\n": "",
		"PROXY UNKNOWN ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff 65535 65535\r\n": "",
		signature + "\x21\x11\x00\x0c" + four:                  "100.64.0.7:41000",
		signature + "\x21\x11\x00\x0f" + four + "\x04\x00\x00": "100.64.0.7:41000", // with an extension
		signature + "\x21\x21\x00\x24" + six:                   "[fd7a:115c:a1e0::7]:41000",
		signature + "\x20\x11\x00\x0c" + four:                  "", // LOCAL
		signature + "\x21\x12\x00\x0c" + four:                  "", // UDP
		signature + "\x21\x00\x00\x00":                         "",

		"GET / HTTP/1.1\r\n":                               refused,
		"PROXY TCP4 100.64.0.7 100.64.0.1 41000 8082\n":    refused,
		"PROXY TCP4 100.64.0.7 100.64.0.1 41000 8082 \r\n": refused,
		"PROXY TCP4 100.64.0.7 100.64.0.1 041000 8082\r\n": refused,
		"PROXY TCP4 100.64.0.7 100.64.0.1 65536 8082\r\n":  refused,
		"PROXY TCP4 100.64.0.7 here 41000 8082\r\n":        refused,
		"PROXY TCP4 ::1 ::1 41000 8082\r\n":                refused,
		"PROXY TCP6 fe80::7%eth0 ::1 41000 8082\r\n":       refused,
		"PROXY \r\n":                          refused,
		"PROXY " + strings.Repeat("x", 200):   refused,
		signature + "\x11\x11\x00\x0c" + four: refused, // version 1
		signature + "\x22\x11\x00\x0c" + four: refused, // neither LOCAL nor PROXY
		signature + "\x21\x11\x00\x0b" + four: refused, // too short for its address
		signature + "\x21\x21\x00\x23" + six:  refused,
		signature + "\x21\x41\x00\x00":        refused, // no such family
		signature + "\x21\x11\xff\xff" + four: refused,
	} {
		client, size, err := parseProxyHeader([]byte(header + "GET /"))
		got := ""
		if err != nil {
			got, size = refused, len(header)
		} else if client.IsValid() {
			got = client.String()
		}
		equal(t, fmt.Sprintf("%q", header), got, want)
		equal(t, fmt.Sprintf("the size of %q", header), size, len(header))
	}
}

// TestProxyListener: on loopback, where this process owns both ends. Who is not tailscaled's user may claim nothing.
func TestProxyListener(t *testing.T) {
	const hello = "PROXY TCP4 100.64.0.7 100.64.0.1 41000 8082\r\n"
	me := uint32(os.Getuid())
	for _, row := range []struct {
		name, addr, begin string
		daemon            uint32
		err               error // of looking for the daemon
		peer              identity
		refusal           string // in the log; "" if the claim is believed
	}{
		{name: "tailscaled", addr: "127.0.0.2:0", begin: hello, daemon: me},
		{name: "no header", addr: "127.0.0.2:0", daemon: me, refusal: "it does not begin with a PROXY header"},
		{name: "another user", addr: "127.0.0.2:0", begin: hello, daemon: me + 1, refusal: fmt.Sprintf("it is not tailscaled's: it belongs to user %d, tailscaled's socket to user %d", me, me+1)},
		{name: "no tailscaled", addr: "127.0.0.2:0", begin: hello, err: os.ErrNotExist, refusal: "file does not exist"},
		{name: "tailscaled at an address for peers", addr: "127.0.0.1:0", begin: hello, daemon: me},
		{name: "a peer there", addr: "127.0.0.1:0", begin: hello, daemon: me, peer: alice, refusal: "it is a forgery by laptop.x.ts.net (alice@example.com), who connected directly and claims to be 100.64.0.7:41000"},
		{name: "IPv6", addr: "[::1]:0", begin: hello, daemon: me, peer: alice, refusal: "it is a forgery"},
	} {
		t.Run(row.name, func(t *testing.T) {
			from := must(net.Listen("tcp", row.addr))
			var log logRecorder
			l := &serviceListener{
				Listener: from, clients: newClientListener(from, rigConnections), refused: &throttledWarnings{log: log.syncLogger()},
				daemon: func() (uint32, error) { return row.daemon, row.err },
				whoIs: func(_ context.Context, addr string) (identity, error) {
					host, _, _ := net.SplitHostPort(addr)
					holds(t, host == "127.0.0.1" || host == "::1", "asked about %s", addr)
					return row.peer, nil
				},
			}
			defer l.clients.Close()
			server := &http.Server{ConnContext: withConn, ConnState: connState, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, connOf(r).claimed) })}
			go server.Serve(l)
			defer server.Close()
			conn := must(net.Dial("tcp", from.Addr().String()))
			defer conn.Close()
			fmt.Fprint(conn, row.begin, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if row.refusal != "" {
				holds(t, err != nil && strings.Contains(fmt.Sprint(log.lines(t)), row.refusal), "answered %v; want none, and %q in the log %v", resp, row.refusal, log.lines(t))
			} else if err != nil {
				t.Errorf("%v\n%s", err, fmt.Sprint(log.lines(t)))
			} else {
				equal(t, "the client", string(must(io.ReadAll(resp.Body))), "100.64.0.7:41000")
			}
		})
	}
}

// TestSilentProxyClient: a connection without a header is not kept.
func TestSilentProxyClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logRecorder
		from := newPipeListener()
		l := &serviceListener{Listener: from, clients: newClientListener(from, 1), refused: &throttledWarnings{log: log.syncLogger()}}
		server := &http.Server{ConnContext: withConn, ConnState: connState}
		go server.Serve(l)
		conn := must(from.dial(t.Context(), "", ""))
		start := time.Now()
		n, err := conn.Read(make([]byte, 1))
		holds(t, n == 0 && err == io.EOF && time.Since(start) == proxyHeaderTime, "it ended with %d bytes, %v, after %v", n, err, time.Since(start))
		server.Close()
		l.clients.Close()
	})
}
