//go:build faults

package faults

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// An h2Upstream speaks HTTP/2 frame by frame, over TLS.
type h2Upstream struct {
	s        *scene
	ca       *authority
	listener net.Listener
	healthy  atomic.Bool
	requests atomic.Int32 // whose headers came, plain ones aside

	mu    sync.Mutex
	conns map[net.Conn]bool
}

// An h2Peer is a connection that the proxy opened to an h2Upstream.
type h2Peer struct {
	net.Conn
	*http2.Framer
	up *h2Upstream
	n  int // 1 for the upstream's first connection

	encoded bytes.Buffer
	encoder *hpack.Encoder
}

// h2upstream runs an h2Upstream with these settings. harm gets each request, by its
// stream, as soon as its headers are in; returning false closes the connection.
func (s *scene) h2upstream(settings []http2.Setting, harm func(p *h2Peer, stream uint32) bool) *h2Upstream {
	s.Helper()
	u := &h2Upstream{s: s, ca: newAuthority(s), conns: map[net.Conn]bool{}}
	listener, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{
		Certificates: []tls.Certificate{u.ca.certificate(nil)}, NextProtos: []string{"h2"},
	})
	if err != nil {
		s.Fatal(err)
	}
	u.listener = listener
	s.mend, s.hangUp = func() { u.healthy.Store(true) }, u.hangUp
	s.Cleanup(func() { listener.Close(); u.hangUp() })
	go func() {
		for n := 1; ; n++ {
			conn, err := listener.Accept()
			if err != nil {
				return // closed
			}
			u.mu.Lock()
			u.conns[conn] = true
			u.mu.Unlock()
			go u.serve(&h2Peer{Conn: conn, up: u, n: n}, settings, harm)
		}
	}()
	return u
}

func (u *h2Upstream) url() string { return "https://" + u.listener.Addr().String() }

// hangUp closes all connections.
func (u *h2Upstream) hangUp() {
	u.mu.Lock()
	defer u.mu.Unlock()
	for conn := range u.conns {
		conn.Close()
	}
}

// connected returns the number of connections.
func (u *h2Upstream) connected() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.conns)
}

// got checks how many requests, plain ones aside, have reached the upstream.
func (u *h2Upstream) got(want int) {
	u.s.Helper()
	if got := int(u.requests.Load()); got != want {
		u.s.Errorf("the upstream got %d requests, want %d", got, want)
	}
}

func (u *h2Upstream) serve(p *h2Peer, settings []http2.Setting, harm func(*h2Peer, uint32) bool) {
	defer func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		p.Close()
		delete(u.conns, p.Conn)
	}()
	if _, err := io.ReadFull(p.Conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	p.Framer = http2.NewFramer(p.Conn, p.Conn)
	p.Framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	p.encoder = hpack.NewEncoder(&p.encoded)
	p.WriteSettings(settings...)
	for {
		frame, err := p.ReadFrame()
		if err != nil {
			return
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				p.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				p.WritePing(true, f.Data)
			}
		case *http2.MetaHeadersFrame:
			if f.PseudoValue("path") == "/plain" {
				p.answer(f.StreamID, "200", "plain")
				continue
			}
			u.requests.Add(1)
			if u.healthy.Load() {
				p.answer(f.StreamID, "200", "healthy")
			} else if !harm(p, f.StreamID) {
				return
			}
		}
	}
}

// begin sends the headers of an answer.
func (p *h2Peer) begin(stream uint32, status string, header ...hpack.HeaderField) {
	p.encoded.Reset()
	for _, field := range append([]hpack.HeaderField{{Name: ":status", Value: status}}, header...) {
		p.encoder.WriteField(field)
	}
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.encoded.Bytes(), EndHeaders: true})
}

// answer sends a whole answer.
func (p *h2Peer) answer(stream uint32, status, body string) {
	p.begin(stream, status)
	p.WriteData(stream, true, []byte(body))
}

// settle gives the proxy the time to read what was sent, before it is overtaken.
func settle() { time.Sleep(50 * time.Millisecond) }
