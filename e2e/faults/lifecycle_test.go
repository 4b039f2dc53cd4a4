//go:build faults

package faults

import (
	"errors"
	"io"
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
		u := s.Upstream(func(p *proxytest.Peer) { p.Hold() }) // never shakes hands
		s.Start(strings.Replace(u.URL, "http:", "https:", 1), "[proxy]\n"+noDrain)
		pending := s.InBackground(strings.NewReader("{}"))
		proxytest.Eventually(s.T, "a connection at the upstream", func() bool { return u.Connected() == 1 })
		s.Terminate()
		s.Refused(<-pending, 503, "shutting_down", 1, "shutting_down")
	}},
	{name: "SIGTERM while a body arrives", outcome: "the request is finished, if that takes less than `drain_timeout_secs`", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) {
			p.Request()
			p.Say(proxytest.Whole("ok"))
		})
		s.Start(u.URL, "[proxy]\n"+drain)
		body, rest := io.Pipe()
		pending := s.InBackground(body)
		io.WriteString(rest, "first half, ")
		s.AtWork(1)
		s.Signal()
		io.WriteString(rest, "second half")
		rest.Close()
		s.Passed(<-pending, 200, "ok", 1)
		s.Ended()
	}},
	{name: "SIGTERM while a body arrives that never ends", outcome: "503 `shutting_down` when `drain_timeout_secs` are over", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) { p.Request() })
		s.Start(u.URL, "[proxy]\n"+noDrain)
		c := s.Say(message("Content-Length: 100", "", "half"))
		s.AtWork(1)
		s.Terminate()
		s.Refused(c.Answer(), 503, "shutting_down", 0, "shutting_down")
		u.Got(0)
	}},
	{name: "SIGTERM while an attempt is repeated", outcome: "503 `shutting_down` when `drain_timeout_secs` are over", run: func(s *scene) {
		u := s.Upstream(func(p *proxytest.Peer) { p.Request(); p.Hold() })
		s.Start(u.URL, "[proxy]\ntimeout_secs = 1\ntimeout_retries = 10\n"+noDrain)
		pending := s.InBackground(strings.NewReader("{}"))
		u.Reached(2)
		s.Terminate()
		s.Refused(<-pending, 503, "shutting_down", -1, "shutting_down")
	}},
	{name: "SIGTERM under load", outcome: "every request that the upstream got is answered with what it said; the others get 503, or no connection", run: sigtermUnderLoad},
}

// answersLater starts the proxy in front of an upstream that answers as soon as it is released, and sends a
// request there: release shows that it is answered.
func (s *scene) answersLater(config string) (release func()) {
	s.Helper()
	released := make(chan struct{})
	u := s.Upstream(func(p *proxytest.Peer) {
		p.Request()
		<-released
		p.Say("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
	})
	s.Start(u.URL, config)
	pending := s.InBackground(strings.NewReader("{}"))
	u.Reached(1)
	return func() {
		close(released)
		s.Passed(<-pending, 200, "ok", 1)
		u.Got(1)
	}
}

func sigtermUnderLoad(s *scene) {
	var processed atomic.Int32
	u := s.Upstream(func(p *proxytest.Peer) {
		for p.Request() != nil {
			processed.Add(1)
			time.Sleep(10 * time.Millisecond)
			p.Say(proxytest.Whole("ok"))
		}
	})
	s.Start(u.URL, "[proxy]\nmax_connections = 10\n"+drain)
	s.Client.Transport.(*http.Transport).DisableKeepAlives = true
	var mu sync.Mutex
	answers := map[int]int{}
	var clients sync.WaitGroup
	for range 30 {
		clients.Go(func() {
			for {
				a, err := s.Try(s.Request("POST", "/v1/messages", strings.NewReader("{}")))
				if errors.Is(err, syscall.ECONNREFUSED) {
					return
				}
				if err != nil {
					// Connections that the kernel had accepted, and the proxy had not, are
					// reset: the count below shows that nothing of theirs was processed.
					s.Logf("no connection: %v", err)
					continue
				}
				if a.Err != nil {
					s.Errorf("an answer broke off: %v", a.Err)
				}
				mu.Lock()
				answers[a.StatusCode]++
				switch a.StatusCode {
				case 200:
					s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
				case 503:
					s.Expect(proxytest.Completed{Status: 503, Attempts: 0, Err: "shutting_down"})
				default:
					s.Errorf("status %d: %s", a.StatusCode, a.Text)
				}
				mu.Unlock()
			}
		})
	}
	for processed.Load() < 100 {
		time.Sleep(time.Millisecond)
	}
	s.Terminate()
	clients.Wait()
	s.Logf("answers by status: %v", answers)
	if got := int(processed.Load()); got != answers[200] {
		s.Errorf("the upstream has processed %d requests, clients got %d of the answers", got, answers[200])
	}
}

// limitFaults are configurations at their limits.
var limitFaults = []fault{
	{name: "every number of the configuration at its minimum", outcome: "serves; a body of 1 MiB is taken, one byte more is refused", run: func(s *scene) {
		s.Start(s.server(count), `[proxy]
timeout_secs = 1
timeout_retries = 0
connect_timeout_secs = 1
max_connections = 1
max_body_mb = 1
body_memory_mb = 1
drain_timeout_secs = 0
`)
		s.Passed(s.upload(mib), 200, "1048576", 1)
		s.Refused(s.upload(mib+1), 400, "invalid_request", 0, "invalid_request")
	}},
	{name: "every number of the configuration at its maximum", outcome: "serves, bodies of any size up to 1 GiB; nothing is allocated in advance", release: true, run: func(s *scene) {
		s.Start(s.server(count), `[proxy]
timeout_secs = 3600
timeout_retries = 10
connect_timeout_secs = 300
max_connections = 100000
max_body_mb = 1024
body_memory_mb = 65536
drain_timeout_secs = 3600
`)
		rss, err := s.Proxy.RSS()
		if err != nil || rss > 32*mib {
			s.Errorf("the proxy holds %d MiB at the start (%v), want 32 at most", rss/mib, err)
		}
		s.Passed(s.upload(64*mib), 200, "67108864", 1)
		s.Passed(s.Send("POST", "/v1/messages", strings.NewReader("{}")), 200, "2", 1)
	}},
}
