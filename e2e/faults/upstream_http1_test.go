//go:build faults

package faults

import (
	"strings"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// upstreamFaults are those of an upstream that speaks HTTP/1.1, or tries to.
var upstreamFaults = []fault{
	{name: "refuses connections", outcome: "502 `connection` after one repetition", run: func(s *scene) {
		addr := proxytest.Must(proxytest.FreeAddr())(s.T)
		s.Start("http://"+addr, "")
		s.Refused(s.Post(), 502, "connection", 2, "refused")
		s.Mend = func() { s.UpstreamAt(addr, func(p *proxytest.Peer) { p.Request() }) }
	}},
	{name: "resets each connection at once", outcome: "502 `connection`; sent once more at most, as nothing can have been processed", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) { p.Reset() })
		s.Start(u.URL, "")
		s.Refused(s.Post(), 502, "connection", -1, "connection:")
	}},
	{name: "resets in the middle of the headers", outcome: "502 `connection`; not sent again: it may have been processed",
		run: says("HTTP/1.1 200 OK\r\nContent-", (*proxytest.Peer).Reset, isRefused("connection:"))},
	{name: "resets in the middle of a body", outcome: "the answer breaks off as it came; `response_read`",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nbeginning", (*proxytest.Peer).Reset, isBroken("beginning", "reset"))},
	{name: "resets in the middle of an event", outcome: "the stream breaks off, its complete events delivered; `response_read`",
		run: says(proxytest.Chunked(proxytest.Event)+"50\r\nevent: content_block_delta\n", (*proxytest.Peer).Reset, isBroken(proxytest.Event, "reset"))},
	{name: "closes its sending side after the request", outcome: "502 `connection`; not sent again",
		run: says("", (*proxytest.Peer).Finish, isRefused("EOF"))},
	{name: "closes its sending side in a stream", outcome: "the stream breaks off; `response_read`",
		run: says(proxytest.Chunked(proxytest.Event), (*proxytest.Peer).Finish, isBroken(proxytest.Event, "EOF"))},
	{name: "closes a connection together with the next request", outcome: "502 `connection`; not sent again, even with an `Idempotency-Key`", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) {
			for req := p.Request(); req != nil && req.URL.Path != "/second"; req = p.Request() {
				p.Say(proxytest.Whole("ok"))
			}
		})
		s.Start(u.URL, "")
		s.Passed(s.Post(), 200, "ok", 1)
		s.Refused(s.Send("POST", "/second", strings.NewReader("{}"), "Idempotency-Key", "key-1"), 502, "connection", 1, "EOF")
		u.Got(2)
	}},
	{name: "sends garbage instead of HTTP", outcome: "502 `connection`; the garbage is not logged", run: func(s *scene) {
		says("\x00\x01SECRET-GARBAGE\r\n\r\n", (*proxytest.Peer).Close, isRefused("malformed"))(s)
		if strings.Contains(s.Proxy.Stdout(), "GARBAGE") {
			s.Error("the log quotes the upstream")
		}
	}},
	{name: "sends a header of 1 MB", outcome: "502 `connection`",
		run: says("HTTP/1.1 200 OK\r\n"+proxytest.HeaderLine("X-Large", 1<<20)+"Content-Length: 0\r\n\r\n", (*proxytest.Peer).Hold, isRefused("header"))},
	{name: "sends a bad chunk", outcome: "the answer breaks off; `response_read`",
		run: says(proxytest.Chunked(proxytest.Event)+"not a size\r\n", (*proxytest.Peer).Hold, isBroken(proxytest.Event, "chunk"))},
	{name: "sends fewer bytes than it declares", outcome: "the answer breaks off; `response_read`",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", (*proxytest.Peer).Close, isBroken("short", "EOF"))},
	{name: "sends more bytes than it declares", outcome: "as many as declared; the rest can't become another answer",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlongHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", (*proxytest.Peer).Hold, isPassed(200, "long"))},
	{name: "ends its answer with the connection, as HTTP/1.0 does", outcome: "passed on whole",
		run: says("HTTP/1.0 200 OK\r\n\r\nto the end", (*proxytest.Peer).Close, isPassed(200, "to the end"))},
	{name: "answers with a status that nobody knows", outcome: "passed on",
		run: says("HTTP/1.1 799 Odd\r\nConnection: close\r\nContent-Length: 3\r\n\r\nodd", (*proxytest.Peer).Close, isPassed(799, "odd"))},
	{name: "sends interim answers before the answer", outcome: "the answer; they are not passed on",
		run: says("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", (*proxytest.Peer).Close, isPassed(200, "ok"))},
	{name: "sends interim answers without end", outcome: "502 `connection` once they are more than headers may be; they are not passed on",
		run: says("", func(p *proxytest.Peer) error {
			for p.Say("HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n") {
			}
			return nil
		}, isRefused("headers exceeded"))},
	{name: "switches protocols, unasked", outcome: "502 `connection`",
		run: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nframes", (*proxytest.Peer).Hold, isRefused("switched protocols"))},
	{name: "answers before it has read the request, and closes", outcome: "its answer, whole", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) {
			p.Head()
			p.Say("HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\nConnection: close\r\n\r\ntoo much")
			p.Finish()
		})
		s.Start(u.URL, "")
		s.answeredEarly()
	}},
	{name: "closes all idle connections at once", outcome: "no request fails: they go over new connections", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) {
			for p.Request() != nil {
				p.Say(proxytest.Whole("ok"))
			}
		})
		s.Start(u.URL, "")
		all := func() {
			s.crowd(20, 1, func() proxytest.Answer { return s.Send("POST", "/v1/messages", strings.NewReader("{}")) }, isPassedAfter(-1, 200, "ok"))
		}
		all()
		u.HangUp()
		s.CheckUsage() // a request that crosses with the end of its connection may have been processed: it would fail
		all()
	}},
}

// A want says what a request is to get.
type want func(*scene, proxytest.Answer)

// says harms a request whose upstream has read it: it gets text for an answer, and then the connection's end.
func says(text string, end func(*proxytest.Peer) error, want want) func(*scene) {
	return func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) {
			p.Request()
			p.Say(text)
			proxytest.Settle() // a reset overtakes what was not yet read
			end(p)
		})
		s.Start(u.URL, "")
		want(s, s.Post())
		u.Got(1)
	}
}

// isRefused is an answer of the proxy's, with this cause in the log: the upstream's is none.
func isRefused(err string) want { return isRefusedAfter(1, err) }

func isRefusedAfter(attempts int, err string) want {
	return func(s *scene, a proxytest.Answer) { s.Helper(); s.Refused(a, 502, "connection", attempts, err) }
}

// isBroken is the beginning of an answer, with this cause in the log.
func isBroken(beginning, err string) want {
	return func(s *scene, a proxytest.Answer) { s.Helper(); s.Broken(a, beginning, err) }
}

// isPassed is the upstream's answer.
func isPassed(status int, body string) want { return isPassedAfter(1, status, body) }

func isPassedAfter(attempts, status int, body string) want {
	return func(s *scene, a proxytest.Answer) { s.Helper(); s.Passed(a, status, body, attempts) }
}

// answeredEarly sends large requests to an upstream that does not wait for their end.
func (s *scene) answeredEarly() {
	s.Helper()
	for range 10 { // it is a race in every HTTP client
		s.Passed(s.Send("POST", "/v1/messages", zeros(5*mib)), 413, "too much", 1)
	}
}
