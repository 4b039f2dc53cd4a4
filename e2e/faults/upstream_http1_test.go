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
		u := s.upstream((*peer).untilClosed)
		s.start(u.url(), quick)
		began := time.Now()
		s.refused(s.post(), 504, "timeout", 2, "no response headers in time")
		if took := time.Since(began); took < 2*time.Second {
			s.Errorf("given up after %v, want 2 s at least: two attempts", took)
		}
	}},
	{name: "resets each connection at once", outcome: "502 `connection`; sent once more at most, as nothing can have been processed", run: func(s *scene) {
		u := s.upstream((*peer).reset)
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", -1, "connection:")
	}},
	{name: "resets in the middle of the headers", outcome: "502 `connection`; not sent again: it may have been processed", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-")
			p.reset()
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "connection:")
		u.got(1)
	}},
	{name: "resets in the middle of a body", outcome: "the answer breaks off as it came; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nbeginning")
			time.Sleep(50 * time.Millisecond) // a reset overtakes what was not yet read
			p.reset()
		})
		s.start(u.url(), "")
		s.broken(s.post(), "beginning", "reset")
		u.got(1)
	}},
	{name: "resets in the middle of an event", outcome: "the stream breaks off, its complete events delivered; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say(chunked(event))
			p.say("50\r\nevent: content_block_delta\n")
			time.Sleep(50 * time.Millisecond)
			p.reset()
		})
		s.start(u.url(), "")
		s.broken(s.post(), event, "reset")
		u.got(1)
	}},
	{name: "closes its sending side after the request", outcome: "502 `connection`; not sent again", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.CloseWrite()
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "EOF")
		u.got(1)
	}},
	{name: "closes its sending side in a stream", outcome: "the stream breaks off; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say(chunked(event))
			p.CloseWrite()
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.broken(s.post(), event, "EOF")
	}},
	{name: "sends garbage instead of HTTP", outcome: "502 `connection`; the garbage is not logged", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("\x00\x01SECRET-GARBAGE\r\n\r\n")
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "malformed")
		if strings.Contains(s.proxy.Stdout(), "GARBAGE") {
			s.Error("the log quotes the upstream")
		}
	}},
	{name: "sends a header of 1 MB", outcome: "502 `connection`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\n" + header("X-Large", 1<<20) + "Content-Length: 0\r\n\r\n")
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "header")
		u.got(1)
	}},
	{name: "sends a bad chunk", outcome: "the answer breaks off; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say(chunked(event))
			p.say("not a size\r\n")
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.broken(s.post(), event, "chunk")
	}},
	{name: "sends fewer bytes than it declares", outcome: "the answer breaks off; `response_read`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort")
		})
		s.start(u.url(), "")
		s.broken(s.post(), "short", "EOF")
	}},
	{name: "sends more bytes than it declares", outcome: "as many as declared; the rest can't become another answer", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlongHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nother")
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.passed(s.post(), 200, "long", 1)
	}},
	{name: "sends interim answers without end", outcome: "502 `connection` once they are more than headers may be; they are not passed on", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			for p.say("HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n") {
			}
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "headers exceeded")
	}},
	{name: "switches protocols, unasked", outcome: "502 `connection`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\nframes")
			p.untilClosed()
		})
		s.start(u.url(), "")
		s.refused(s.post(), 502, "connection", 1, "switched protocols")
	}},
	{name: "answers before it has read the request, and closes", outcome: "its answer, whole", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.head()
			p.say("HTTP/1.1 413 Too Large\r\nContent-Length: 8\r\nConnection: close\r\n\r\ntoo much")
			p.CloseWrite()
			p.untilClosed()
		})
		s.start(u.url(), "")
		a, err := s.send("POST", "/v1/messages", strings.NewReader(strings.Repeat("x", 5<<20)))
		if err != nil {
			s.Fatal(err)
		}
		s.passed(a, 413, "too much", 1)
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
			p.untilClosed()
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
