//go:build faults

package faults

import (
	"io"
	"strings"
	"sync/atomic"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// http2Faults are those of an upstream that speaks HTTP/2.
var http2Faults = []fault{
	{name: "GOAWAY in order, with a request under way", outcome: "that request's answer, whole; the next one goes over a new connection", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			if p.n == 1 {
				p.WriteGoAway(stream, http2.ErrCodeNo, nil)
				settle()
			}
			p.answer(stream, "200", "whole")
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.passed(s.post(), 200, "whole", 1)
		s.passed(s.post(), 200, "whole", 1)
		u.got(2)
	}},
	{name: "GOAWAY that disowns a request", outcome: "the request is sent once more, over a new connection: the upstream says that it was not processed", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			if p.n == 1 {
				p.WriteGoAway(0, http2.ErrCodeNo, nil)
				return true
			}
			p.answer(stream, "200", "second")
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.passed(s.post(), 200, "second", 2)
		u.got(2)
	}},
	{name: "GOAWAY that disowns requests for ever", outcome: "502 `connection` after one repetition", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.WriteGoAway(0, http2.ErrCodeNo, nil)
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.refused(s.post(), 502, "connection", -1, "connection:")
		u.got(2)
	}},
	{name: "answers 204 with a body", outcome: "204, without it", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.answer(stream, "204", "what nobody may send")
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.passed(s.post(), 204, "", 1)
	}},
	{name: "the connection is lost before the end of an answer whose every byte has come", outcome: "all of it is delivered; `response_read`", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.begin(stream, "200", hpack.HeaderField{Name: "content-length", Value: "5"})
			p.WriteData(stream, false, []byte("whole"))
			settle()
			return false
		})
		s.start(u.url(), "", u.ca.env())
		if a := s.post(); a.StatusCode != 200 || string(a.body) != "whole" {
			s.Errorf("the client got status %d and %q (%v), want 200 and all that came", a.StatusCode, a.body, a.err)
		}
		s.expect(line{status: 200, attempts: 1, errorType: "response_read", err: "response_read:"})
	}},
	{name: "the connection is lost with streams under way", outcome: "each of them breaks off; `response_read`", run: func(s *scene) {
		const streams = 10
		var begun atomic.Int32
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.begin(stream, "200")
			p.WriteData(stream, false, []byte(event))
			if begun.Add(1) == streams {
				settle()
				return false
			}
			return true
		})
		s.start(u.url(), "", u.ca.env())
		answers := make(chan answer, streams)
		for range streams {
			go func() {
				a, err := s.send("POST", "/v1/messages", strings.NewReader("{}"))
				if err != nil {
					s.Error(err)
				}
				answers <- a
			}()
		}
		for range streams {
			if a := <-answers; a.Response != nil {
				s.broken(a, event, "response_read:")
			}
		}
		u.got(streams)
	}},
	{name: "RST_STREAM REFUSED_STREAM once", outcome: "the request is sent once more: the upstream says that it was not processed", run: func(s *scene) {
		var seen atomic.Int32
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			if seen.Add(1)%2 == 1 {
				p.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
			} else {
				p.answer(stream, "200", "second")
			}
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.passed(s.post(), 200, "second", 2)
		s.passed(s.get("/v1/models"), 200, "second", 2)
		u.got(4)
	}},
	{name: "RST_STREAM REFUSED_STREAM for ever", outcome: "502 `connection` after one repetition", run: resets(http2.ErrCodeRefusedStream, 2)},
	{name: "RST_STREAM INTERNAL_ERROR before the headers", outcome: "502 `connection`; not sent again", run: resets(http2.ErrCodeInternal, 1)},
	{name: "RST_STREAM CANCEL before the headers", outcome: "502 `connection`; not sent again", run: resets(http2.ErrCodeCancel, 1)},
	{name: "RST_STREAM in the middle of a stream", outcome: "the stream breaks off; `response_read`", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.begin(stream, "200")
			p.WriteData(stream, false, []byte(event))
			settle()
			p.WriteRSTStream(stream, http2.ErrCodeCancel)
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.broken(s.post(), event, "response_read:")
		u.got(1)
	}},
	{name: "answers before it has read the request", outcome: "its answer, whole", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.answer(stream, "413", "too much")
			p.WriteRSTStream(stream, http2.ErrCodeNo)
			return true
		})
		s.start(u.url(), "", u.ca.env())
		for range 10 { // it is a race in every HTTP client
			s.passed(s.must(s.send("POST", "/v1/messages", strings.NewReader(strings.Repeat("x", 5<<20)))), 413, "too much", 1)
		}
	}},
	{name: "stalls in the middle of a stream", outcome: "the stream breaks off after `timeout_secs` of silence, and its connection serves others; `response_read`", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.begin(stream, "200")
			p.WriteData(stream, false, []byte(event))
			return true
		})
		s.start(u.url(), quick, u.ca.env())
		s.broken(s.post(), event, "silent")
		if n := u.connected(); n != 1 {
			s.Errorf("%d connections upstream, want the one", n)
		}
	}},
	{name: "a window that never opens", outcome: "504 `timeout`: the request can't be sent", run: func(s *scene) {
		none := []http2.Setting{{ID: http2.SettingInitialWindowSize, Val: 0}}
		u := s.h2upstream(none, func(*h2Peer, uint32) bool { return true })
		s.start(u.url(), "[proxy]\ntimeout_secs = 1\ntimeout_retries = 0\n", u.ca.env())
		s.refused(s.post(), 504, "timeout", 1, "no response headers in time")
		s.mend = func() { u.healthy.Store(true); s.checkUsage() } // a request that crosses with the end of its connection fails
	}},
	{name: "a connection that falls silent without an end", outcome: "its streams break off after `timeout_secs`; pings tell that it is dead, and new requests go over another", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			if p.n > 1 {
				p.answer(stream, "200", "second")
				return true
			}
			p.begin(stream, "200")
			p.WriteData(stream, false, []byte(event))
			io.Copy(io.Discard, p.Conn) // no ping is answered
			return false
		})
		s.start(u.url(), quick, u.ca.env())
		s.broken(s.post(), event, "response_read:")
		s.eventually(func() string {
			if u.connected() > 0 {
				return "the proxy keeps the dead connection"
			}
			return ""
		})
		s.passed(s.post(), 200, "second", 1)
	}},
	{name: "frames that no HTTP/2 has", outcome: "502 `connection`", run: func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, stream, []byte("\xff\xff\xff\xff garbage"))
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.refused(s.post(), 502, "connection", -1, "connection:")
		u.got(1)
	}},
}

// resets has every request, with a body or without, reset with this code; each is sent so many times.
func resets(code http2.ErrCode, times int) func(*scene) {
	return func(s *scene) {
		u := s.h2upstream(nil, func(p *h2Peer, stream uint32) bool {
			p.WriteRSTStream(stream, code)
			return true
		})
		s.start(u.url(), "", u.ca.env())
		s.refused(s.post(), 502, "connection", times, code.String())
		s.refused(s.get("/v1/models"), 502, "connection", times, code.String())
		u.got(2 * times)
	}
}
