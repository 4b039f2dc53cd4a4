package proxytest

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// An H2Peer is a connection that the proxy opened to a [Scene.H2Upstream].
type H2Peer struct {
	net.Conn
	*http2.Framer
	N int // 1 for the upstream's first connection

	encoded bytes.Buffer
	encoder *hpack.Encoder
}

// H2Upstream runs an [Upstream] that speaks HTTP/2 frame by frame, over TLS, with these settings. harm gets each request, by its
// stream, as soon as its headers are in; returning false closes the connection.
func (s *Scene) H2Upstream(settings []http2.Setting, harm func(p *H2Peer, stream uint32) bool) *Upstream {
	s.Helper()
	ca, env := s.Authority()
	certificate := Must(ca.Certificate(nil))(s)
	listener := Must(tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2"}}))(s)
	return s.upstream(listener, env, func(u *Upstream, n int, conn net.Conn) {
		(&H2Peer{Conn: conn, N: n}).serve(u, settings, harm)
	})
}

func (p *H2Peer) serve(u *Upstream, settings []http2.Setting, harm func(*H2Peer, uint32) bool) {
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
			if f.PseudoValue("path") == fakeanthropic.PlainPath {
				p.Answer(f.StreamID, "200", "plain")
				continue
			}
			u.Requests.Add(1)
			if u.healthy.Load() {
				p.Answer(f.StreamID, "200", "healthy")
			} else if !harm(p, f.StreamID) {
				return
			}
		}
	}
}

// Begin sends the headers of an answer, and of its body what there is.
func (p *H2Peer) Begin(stream uint32, body string, header ...hpack.HeaderField) {
	p.headers(stream, "200", header...)
	p.WriteData(stream, false, []byte(body))
}

// Answer sends a whole answer.
func (p *H2Peer) Answer(stream uint32, status, body string) {
	p.headers(stream, status)
	p.WriteData(stream, true, []byte(body))
}

func (p *H2Peer) headers(stream uint32, status string, header ...hpack.HeaderField) {
	p.encoded.Reset()
	for _, field := range append([]hpack.HeaderField{{Name: ":status", Value: status}}, header...) {
		p.encoder.WriteField(field)
	}
	p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: p.encoded.Bytes(), EndHeaders: true})
}

// Settle gives the proxy the time to read what was sent, before it is overtaken.
func Settle() { time.Sleep(50 * time.Millisecond) }
