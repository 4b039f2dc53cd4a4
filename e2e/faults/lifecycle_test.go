//go:build faults

package faults

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// drain and noDrain say how long requests may go on after SIGTERM.
const (
	drain   = "drain_timeout_secs = 15\n"
	noDrain = "drain_timeout_secs = 0\n"
)

// lifeCycleFaults are SIGTERM at the worst moment.
var lifeCycleFaults = []fault{
	{name: "SIGTERM while connecting to the upstream", outcome: "503 `shutting_down` when `drain_timeout_secs` are over; exit code 0", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.hold() }) // never shakes hands
		s.start(strings.Replace(u.url(), "http:", "https:", 1), "[proxy]\n"+noDrain)
		pending := s.inBackground("{}")
		s.atUpstream(u, 1)
		s.terminate()
		s.refused(<-pending, 503, "shutting_down", 1, "shutting_down")
	}},
	{name: "SIGTERM while queued", outcome: "503 `shutting_down` at once, to be tried again; the request at work is finished", run: func(s *scene) {
		release := make(chan struct{})
		u := s.upstream(func(p *peer) {
			p.request()
			<-release
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		})
		s.start(u.url(), "[proxy]\nmax_connections = 1\n"+drain)
		first := s.inBackground("{}")
		s.reached(u, 1)
		queued := s.inBackground("{}")
		s.gauge("proxy_requests_queued", 1)
		s.signal()
		s.refused(<-queued, 503, "shutting_down", 0, "shutting_down")
		close(release)
		s.passed(<-first, 200, "ok", 1)
		s.ended()
	}},
	{name: "SIGTERM while a body arrives", outcome: "the request is finished, if that takes less than `drain_timeout_secs`", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		})
		s.start(u.url(), "[proxy]\n"+drain)
		body, rest := io.Pipe()
		pending := s.sendInBackground(body)
		io.WriteString(rest, "first half, ")
		s.atWork(1)
		s.signal()
		io.WriteString(rest, "second half")
		rest.Close()
		s.passed(<-pending, 200, "ok", 1)
		s.ended()
	}},
	{name: "SIGTERM while a body arrives that never ends", outcome: "503 `shutting_down` when `drain_timeout_secs` are over", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.request() })
		s.start(u.url(), "[proxy]\n"+noDrain)
		conn, err := net.Dial("tcp", s.proxy.Addr())
		if err != nil {
			s.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
		s.atWork(1)
		s.terminate()
		all, _ := io.ReadAll(conn)
		if !strings.HasPrefix(string(all), "HTTP/1.1 503 ") || !strings.Contains(string(all), "shutting_down") {
			s.Errorf("the client got %q, want 503", all)
		}
		s.expect(line{status: 503, attempts: 0, err: "shutting_down"})
		u.got(0)
	}},
	{name: "SIGTERM while waiting for the answer", outcome: "the answer, if it comes within `drain_timeout_secs`", run: func(s *scene) {
		release := make(chan struct{})
		u := s.upstream(func(p *peer) {
			p.request()
			<-release
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		})
		s.start(u.url(), "[proxy]\n"+drain)
		pending := s.inBackground("{}")
		s.reached(u, 1)
		s.signal()
		close(release)
		s.passed(<-pending, 200, "ok", 1)
		s.ended()
	}},
	{name: "SIGTERM while an attempt is repeated", outcome: "503 `shutting_down` when `drain_timeout_secs` are over", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.request(); p.hold() })
		s.start(u.url(), "[proxy]\ntimeout_secs = 1\ntimeout_retries = 10\n"+noDrain)
		pending := s.inBackground("{}")
		s.reached(u, 2)
		s.terminate()
		s.refused(<-pending, 503, "shutting_down", -1, "shutting_down")
	}},
	{name: "SIGTERM in the middle of a stream", outcome: "the stream goes on for `drain_timeout_secs`, and then breaks off", run: func(s *scene) {
		u := s.upstream(func(p *peer) {
			p.request()
			for p.say(chunked(event)); p.say(chunk(event)); time.Sleep(50 * time.Millisecond) {
			}
		})
		s.start(u.url(), "[proxy]\ndrain_timeout_secs = 1\n")
		pending := s.inBackground("{}")
		s.reached(u, 1)
		took := s.terminate()
		a := <-pending
		if !strings.HasPrefix(string(a.body), event+event) || a.err == nil {
			s.Errorf("the client got %.200q (%v), want events and a broken end", a.body, a.err)
		}
		if took < time.Second {
			s.Errorf("the stream was cut after %v, want 1 s at least", took)
		}
		s.expect(line{status: 200, attempts: 1, err: "shutting_down"})
	}},
	{name: "SIGTERM twice", outcome: "the second one ends the drain at once; exit code 0", run: func(s *scene) {
		u := s.upstream(func(p *peer) { p.request(); p.hold() })
		s.start(u.url(), "[proxy]\ndrain_timeout_secs = 3600\n")
		pending := s.inBackground("{}")
		s.reached(u, 1)
		s.signal()
		s.terminate()
		s.refused(<-pending, 503, "shutting_down", 1, "shutting_down")
	}},
	{name: "SIGTERM under load", outcome: "every request that the upstream got is answered with what it said; the others get 503, or no connection", run: sigtermUnderLoad},
}

func sigtermUnderLoad(s *scene) {
	var processed atomic.Int32
	u := s.upstream(func(p *peer) {
		for p.request() != nil {
			processed.Add(1)
			time.Sleep(10 * time.Millisecond)
			p.say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		}
	})
	s.start(u.url(), "[proxy]\nmax_connections = 10\n"+drain)
	s.client.Transport.(*http.Transport).DisableKeepAlives = true
	var mu sync.Mutex
	answers := map[int]int{}
	var clients sync.WaitGroup
	for range 30 {
		clients.Go(func() {
			for {
				a, err := s.send("POST", "/v1/messages", strings.NewReader("{}"))
				if errors.Is(err, syscall.ECONNREFUSED) {
					return
				}
				if err != nil {
					// Connections that the kernel had accepted, and the proxy had not, are
					// reset: the count below shows that nothing of theirs was processed.
					s.Logf("no connection: %v", err)
					continue
				}
				if a.err != nil {
					s.Errorf("an answer broke off: %v", a.err)
				}
				mu.Lock()
				answers[a.StatusCode]++
				switch a.StatusCode {
				case 200:
					s.expect(line{status: 200, attempts: 1})
				case 503:
					s.expect(line{status: 503, attempts: 0, err: "shutting_down"})
				default:
					s.Errorf("status %d: %s", a.StatusCode, a.body)
				}
				mu.Unlock()
			}
		})
	}
	for processed.Load() < 100 {
		time.Sleep(time.Millisecond)
	}
	s.terminate()
	clients.Wait()
	s.Logf("answers by status: %v", answers)
	if got := int(processed.Load()); got != answers[200] {
		s.Errorf("the upstream has processed %d requests, clients got %d of the answers", got, answers[200])
	}
}

// inBackground sends a request with this body; its answer comes later. No answer at
// all fails the fault.
func (s *scene) inBackground(body string) <-chan answer {
	return s.sendInBackground(strings.NewReader(body))
}

func (s *scene) sendInBackground(body io.Reader, headers ...string) <-chan answer {
	answers := make(chan answer, 1)
	go func() {
		a, err := s.send("POST", "/v1/messages", body, headers...)
		if err != nil {
			s.Error(err)
			a.Response = &http.Response{} // which no check likes
		}
		answers <- a
	}()
	return answers
}

// reached waits until n requests have reached the upstream.
func (s *scene) reached(u *rawUpstream, n int32) {
	s.Helper()
	s.until("requests at the upstream", func() bool { return u.requests.Load() >= n })
}

// atUpstream waits until the upstream has n connections.
func (s *scene) atUpstream(u *rawUpstream, n int) {
	s.Helper()
	s.until("connections at the upstream", func() bool {
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.conns) >= n
	})
}

// atWork waits until the proxy is at work on n requests.
func (s *scene) atWork(n float64) { s.Helper(); s.gauge("proxy_requests_in_flight", n) }

// gauge waits until a metric has this value.
func (s *scene) gauge(name string, want float64) {
	s.Helper()
	s.until(name, func() bool { return proxytest.Scrape(s.T, s.proxy).Value(name) == want })
}

// until waits for what must happen.
func (s *scene) until(what string, happened func() bool) {
	s.Helper()
	proxytest.Eventually(s.T, what, happened)
}

// signal sends SIGTERM and waits until the proxy has heard it.
func (s *scene) signal() {
	s.Helper()
	if err := s.proxy.Signal(syscall.SIGTERM); err != nil {
		s.Fatal(err)
	}
	if _, err := s.proxy.WaitLog(proxytest.MsgSIGTERM, proxytest.Timeout); err != nil {
		s.Fatal(err)
	}
}

// ended waits until the proxy has ended, as it should.
func (s *scene) ended() {
	s.Helper()
	if code, err := s.proxy.Wait(proxytest.Timeout); err != nil || code != 0 {
		s.Errorf("the proxy ended with code %d (%v), want 0", code, err)
	}
}

// terminate is signal and ended; it returns how long that took.
func (s *scene) terminate() time.Duration {
	s.Helper()
	began := time.Now()
	s.signal()
	s.ended()
	return time.Since(began)
}
