//go:build faults

package faults

import (
	"io"
	"strings"
	"sync/atomic"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// http2Faults are those of an upstream that speaks HTTP/2.
var http2Faults = []fault{
	{name: "GOAWAY in order, with a request under way", outcome: "that request's answer, whole; the next one goes over a new connection",
		run: frames(2, func(p *proxytest.H2Peer, stream uint32) {
			if p.N == 1 {
				p.WriteGoAway(stream, http2.ErrCodeNo, nil)
				proxytest.Settle()
			}
			p.Answer(stream, "200", "whole")
		}, isPassed(200, "whole"), isPassed(200, "whole"))},
	{name: "GOAWAY that disowns a request", outcome: "the request is sent once more, over a new connection: the upstream says that it was not processed",
		run: frames(2, func(p *proxytest.H2Peer, stream uint32) {
			if p.N == 1 {
				p.WriteGoAway(0, http2.ErrCodeNo, nil)
			} else {
				p.Answer(stream, "200", "second")
			}
		}, isPassedAfter(2, 200, "second"))},
	{name: "GOAWAY that disowns requests for ever", outcome: "502 `connection` after one repetition",
		run: frames(2, func(p *proxytest.H2Peer, stream uint32) { p.WriteGoAway(0, http2.ErrCodeNo, nil) }, isRefusedAfter(-1, "connection:"))},
	{name: "answers 204 with a body", outcome: "204, without it",
		run: frames(1, func(p *proxytest.H2Peer, stream uint32) { p.Answer(stream, "204", "what nobody may send") }, isPassed(204, ""))},
	{name: "the connection is lost before the end of an answer whose every byte has come", outcome: "all of it is delivered; `response_read`",
		run: frames(1, func(p *proxytest.H2Peer, stream uint32) {
			p.Begin(stream, "whole", hpack.HeaderField{Name: "content-length", Value: "5"})
			proxytest.Settle()
			p.Close()
		}, func(s *scene, a proxytest.Answer) {
			if a.StatusCode != 200 || a.Text != "whole" {
				s.Errorf("the client got status %d and %q (%v), want 200 and all that came", a.StatusCode, a.Text, a.Err)
			}
			s.Expect(proxytest.Completed{Status: 200, Attempts: 1, ErrorType: "response_read", Err: "response_read:"})
		})},
	{name: "the connection is lost with streams under way", outcome: "each of them breaks off; `response_read`", run: func(s *scene) {
		const streams = 10
		var begun atomic.Int32
		u := s.frames("", func(p *proxytest.H2Peer, stream uint32) {
			p.Begin(stream, proxytest.Event)
			if begun.Add(1) == streams {
				proxytest.Settle()
				p.Close()
			}
		})
		var answers []<-chan proxytest.Answer
		for range streams {
			answers = append(answers, s.InBackground(strings.NewReader("{}")))
		}
		for _, a := range answers {
			s.Broken(<-a, proxytest.Event, "response_read:")
		}
		u.Got(streams)
	}},
	{name: "RST_STREAM REFUSED_STREAM once", outcome: "the request is sent once more: the upstream says that it was not processed", run: func(s *scene) {
		var seen atomic.Int32
		u := s.frames("", func(p *proxytest.H2Peer, stream uint32) {
			if seen.Add(1)%2 == 1 {
				p.WriteRSTStream(stream, http2.ErrCodeRefusedStream)
			} else {
				p.Answer(stream, "200", "second")
			}
		})
		s.Passed(s.Post(), 200, "second", 2)
		s.Passed(s.Get("/v1/models"), 200, "second", 2)
		u.Got(4)
	}},
	{name: "RST_STREAM REFUSED_STREAM for ever", outcome: "502 `connection` after one repetition", run: resets(http2.ErrCodeRefusedStream, 2)},
	{name: "RST_STREAM INTERNAL_ERROR before the headers", outcome: "502 `connection`; not sent again", run: resets(http2.ErrCodeInternal, 1)},
	{name: "RST_STREAM CANCEL before the headers", outcome: "502 `connection`; not sent again", run: resets(http2.ErrCodeCancel, 1)},
	{name: "RST_STREAM in the middle of a stream", outcome: "the stream breaks off; `response_read`",
		run: frames(1, func(p *proxytest.H2Peer, stream uint32) {
			p.Begin(stream, proxytest.Event)
			proxytest.Settle()
			p.WriteRSTStream(stream, http2.ErrCodeCancel)
		}, isBroken(proxytest.Event, "response_read:"))},
	{name: "answers before it has read the request", outcome: "its answer, whole", run: func(s *scene) {
		s.frames("", func(p *proxytest.H2Peer, stream uint32) {
			p.Answer(stream, "413", "too much")
			p.WriteRSTStream(stream, http2.ErrCodeNo)
		})
		s.answeredEarly()
	}},
	{name: "stalls in the middle of a stream", outcome: "the stream breaks off after `timeout_secs` of silence, and its connection serves others; `response_read`", run: func(s *scene) {
		u := s.frames(hasty, func(p *proxytest.H2Peer, stream uint32) { p.Begin(stream, proxytest.Event) })
		s.Broken(s.Post(), proxytest.Event, "silent")
		if n := u.Connected(); n != 1 {
			s.Errorf("%d connections upstream, want the one", n)
		}
	}},
	{name: "a window that never opens", outcome: "504 `timeout`: the request can't be sent", run: func(s *scene) {
		none := http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}
		s.frames("[proxy]\ntimeout_secs = 1\ntimeout_retries = 0\n", func(*proxytest.H2Peer, uint32) {}, none)
		s.Refused(s.Post(), 504, "timeout", 1, "no response headers in time")
		mend := s.Mend
		s.Mend = func() { mend(); s.CheckUsage() } // a request that crosses with the end of its connection fails
	}},
	{name: "a connection that falls silent without an end", outcome: "its streams break off after `timeout_secs`; pings tell that it is dead, and new requests go over another", run: func(s *scene) {
		u := s.frames("[proxy]\ntimeout_secs = 3\n", func(p *proxytest.H2Peer, stream uint32) {
			if p.N > 1 {
				p.Answer(stream, "200", "second")
				return
			}
			p.Begin(stream, proxytest.Event)
			io.Copy(io.Discard, p.Conn) // no ping is answered
		})
		s.Broken(s.Post(), proxytest.Event, "response_read:")
		proxytest.Eventually(s.T, "the dead connection given up", func() bool { return u.Connected() == 0 })
		s.Passed(s.Post(), 200, "second", 1)
	}},
	{name: "frames that no HTTP/2 has", outcome: "502 `connection`",
		run: frames(1, func(p *proxytest.H2Peer, stream uint32) {
			p.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, stream, []byte("\xff\xff\xff\xff garbage"))
		}, isRefusedAfter(-1, "connection:"))},
}

// frames starts the proxy in front of an upstream that answers each request with harm.
func (s *scene) frames(config string, harm func(p *proxytest.H2Peer, stream uint32), settings ...http2.Setting) *proxytest.Upstream {
	s.Helper()
	u := s.H2Upstream(settings, func(p *proxytest.H2Peer, stream uint32) bool { harm(p, stream); return true })
	s.Start(u.URL, config, u.Env)
	return u
}

// frames harms requests, whose answers are to be as wanted, and which reach the upstream so many times.
func frames(times int, harm func(p *proxytest.H2Peer, stream uint32), wants ...want) func(*scene) {
	return func(s *scene) {
		u := s.frames("", harm)
		for _, want := range wants {
			want(s, s.Post())
		}
		u.Got(times)
	}
}

// resets has every request, with a body or without, reset with this code; each is sent so many times.
func resets(code http2.ErrCode, times int) func(*scene) {
	return func(s *scene) {
		u := s.frames("", func(p *proxytest.H2Peer, stream uint32) { p.WriteRSTStream(stream, code) })
		s.Refused(s.Post(), 502, "connection", times, code.String())
		s.Refused(s.Get("/v1/models"), 502, "connection", times, code.String())
		u.Got(2 * times)
	}
}
