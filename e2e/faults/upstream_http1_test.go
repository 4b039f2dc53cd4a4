//go:build faults

package faults

import (
	"net"
	"strings"
	"time"
)

// upstreamFaults are those of an upstream that speaks HTTP/1.1, or tries to.
var upstreamFaults = []fault{
	{name: "refuses connections", outcome: "502 `connection` after one repetition", run: func(s *scene) {
		free, err := net.Listen("tcp", "127.0.0.1:0") // kept bound below: nobody else gets the port
		if err != nil {
			s.Fatal(err)
		}
		addr := free.Addr().String()
		free.Close()
		s.start("http://"+addr, "")
		s.refused(s.post(), 502, "connection", 2, "refused")
		s.mend = func() {
			listener, err := net.Listen("tcp", addr)
			if err != nil {
				s.Fatal(err)
			}
			u := &rawUpstream{s: s, listener: listener, conns: map[net.Conn]bool{}}
			u.healthy.Store(true)
			s.hangUp = u.hangUp
			s.Cleanup(func() { listener.Close(); u.hangUp() })
			go u.serve(nil)
		}
	}},
	{name: "accepts and says nothing", outcome: "504 `timeout` after `timeout_secs`, in 1 + `timeout_retries` attempts", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.hold() })
		s.start(u.url(), quick)
		began := time.Now()
		s.refused(s.post(), 504, "timeout", 2, "no response headers in time")
		if took := time.Since(began); took < 2*time.Second {
			s.Errorf("given up after %v, want 2 s at least: two attempts", took)
		}
	}},
	{name: "resets each connection at once", outcome: "502 `connection`; sent once more at most, as nothing can have been processed", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.reset() })
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", -1, "connection:")
	}},
	{name: "resets in the middle of the headers", outcome: "502 `connection`; not sent again: it may have been processed",
		run: says("HTTP/1.1 200 OK\r\nContent-", (*peer).reset, isRefused("connection:"))},
	{name: "resets in the middle of a body", outcome: "the answer breaks off as it came; `response_read`",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nbeginning", (*peer).reset, isBroken("beginning", "reset"))},
	{name: "resets in the middle of an event", outcome: "the stream breaks off, its complete events delivered; `response_read`",
		run: says(chunked(event)+"50\r\nevent: content_block_delta\n", (*peer).reset, isBroken(event, "reset"))},
	{name: "closes its sending side after the request", outcome: "502 `connection`; not sent again",
		run: says("", (*peer).finish, isRefused("EOF"))},
	{name: "closes its sending side in a stream", outcome: "the stream breaks off; `response_read`",
		run: says(chunked(event), (*peer).finish, isBroken(event, "EOF"))},
	{name: "closes a connection together with the next request", outcome: "502 `connection`; not sent again, even with an `Idempotency-Key`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			for req := p.request(); req != nil && req.URL.Path != "/second"; req = p.request() {
				p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		})
		s.start(u.url(), "")
		s.passed(s.post(), 200, "ok", 1)
		s.refused(s.must(s.send("POST", "/second", strings.NewReader("{}"), "Idempotency-Key", "key-1")), 502, "connection", 1, "EOF")
		u.got(2)
	}},
	{name: "sends garbage instead of HTTP", outcome: "502 `connection`; the garbage is not logged", run: func(s *scene) {
		says("\x00\x01SECRET-GARBAGE\r\n\r\n", (*peer).Close, isRefused("malformed"))(s)
		if strings.Contains(s.proxy.Stdout(), "GARBAGE") {
			s.Error("the log quotes the upstream")
		}
	}},
	{name: "sends a header of 1 MB", outcome: "502 `connection`",
		run: says("HTTP/1.1 200 OK\r\n"+header("X-Large", 1<<20)+"Content-Length: 0\r\n\r\n", (*peer).hold, isRefused("header"))},
	{name: "sends a bad chunk", outcome: "the answer breaks off; `response_read`",
		run: says(chunked(event)+"not a size\r\n", (*peer).hold, isBroken(event, "chunk"))},
	{name: "sends fewer bytes than it declares", outcome: "the answer breaks off; `response_read`",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", (*peer).Close, isBroken("short", "EOF"))},
	{name: "sends more bytes than it declares", outcome: "as many as declared; the rest can't become another answer",
		run: says("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlongHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother", (*peer).hold, isPassed(200, "long"))},
	{name: "ends its answer with the connection, as HTTP/1.0 does", outcome: "passed on whole",
		run: says("HTTP/1.0 200 OK\r\n\r\nto the end", (*peer).Close, isPassed(200, "to the end"))},
	{name: "answers with a status that nobody knows", outcome: "passed on",
		run: says("HTTP/1.1 799 Odd\r\nConnection: close\r\nContent-Length: 3\r\n\r\nodd", (*peer).Close, isPassed(799, "odd"))},
	{name: "sends interim answers before the answer", outcome: "the answer; they are not passed on",
		run: says("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", (*peer).Close, isPassed(200, "ok"))},
	{name: "sends interim answers without end", outcome: "502 `connection` once they are more than headers may be; they are not passed on",
		run: says("", func(p *peer) error {
			for p.say("HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n") {
			}
			return nil
		}, isRefused("headers exceeded"))},
	{name: "switches protocols, unasked", outcome: "502 `connection`",
		run: says("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nframes", (*peer).hold, isRefused("switched protocols"))},
	{name: "answers before it has read the request, and closes", outcome: "its answer, whole", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.head()
			p.say("HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\nConnection: close\r\n\r\ntoo much")
			p.finish()
		})
		s.start(u.url(), "")
		for range 10 { // it is a race in every HTTP client
			s.passed(s.must(s.send("POST", "/v1/messages", strings.NewReader(strings.Repeat("x", 5<<20)))), 413, "too much", 1)
		}
	}},
	{name: "drips a byte at a time", outcome: "passed on as it comes: only silence for `timeout_secs` ends an answer", run: func(s *scene) {
		const slow = "slowly"
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\n")
			for _, c := range slow {
				time.Sleep(600 * time.Millisecond) // with timeout_secs = 1
				p.say(string(c))
			}
		})
		s.start(u.url(), quick)
		s.passed(s.post(), 200, slow, 1)
	}},
	{name: "stalls in the middle of a stream", outcome: "the stream breaks off after `timeout_secs` of silence; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say(chunked(event))
			p.hold()
		})
		s.start(u.url(), quick)
		s.broken(s.post(), event, "silent")
	}},
	{name: "closes all idle connections at once", outcome: "no request fails: they go over new connections", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			for p.request() != nil {
				p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
		})
		s.start(u.url(), "")
		const many = 20
		all := func() {
			done := make(chan answer, many)
			for range many {
				go func() {
					a, err := s.send("POST", "/v1/messages", strings.NewReader("{}"))
					a.err = err
					done <- a
				}()
			}
			for range many {
				if a := <-done; a.err != nil {
					s.Errorf("a request failed: %v", a.err)
				} else {
					s.passed(a, 200, "ok", -1)
				}
			}
		}
		all()
		u.hangUp()
		s.checkUsage() // a request that crosses with the end of its connection may have been processed: it would fail
		all()
	}},
}

// says harms a request whose upstream has read it: it gets text for an answer, and then the connection's end.
func says(text string, end func(*peer) error, want func(*scene, answer)) func(*scene) {
	return func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say(text)
			settle() // a reset overtakes what was not yet read
			end(p)
		})
		s.start(u.url(), "")
		want(s, s.post())
		u.got(1)
	}
}

// isRefused is an answer of the proxy's, with this cause in the log: the upstream's is none.
func isRefused(err string) func(*scene, answer) {
	return func(s *scene, a answer) { s.Helper(); s.refused(a, 502, "connection", 1, err) }
}

// isBroken is the beginning of an answer, with this cause in the log.
func isBroken(beginning, err string) func(*scene, answer) {
	return func(s *scene, a answer) { s.Helper(); s.broken(a, beginning, err) }
}

// isPassed is the upstream's answer.
func isPassed(status int, body string) func(*scene, answer) {
	return func(s *scene, a answer) { s.Helper(); s.passed(a, status, body, 1) }
}
