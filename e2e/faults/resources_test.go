//go:build faults

package faults

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

const mib = 1 << 20

// resourceFaults are those of a machine that has not enough of something.
var resourceFaults = []fault{
	{name: "1,000 uploads of 10 MiB at once, in a container of 128 MiB", release: true, alone: true,
		outcome: "all succeed: bodies wait in line for `body_memory_mb`", run: manyUploads},
	{name: "5 uploads of 10 MiB at 10 KiB/s, in a body memory of 24 MiB", release: true, alone: true,
		outcome: "they hold what they have filled; half of the uploads of 1 MiB beside them take less than a second", run: slowUploads},
	{name: "5,000 connections for 1,000 places", release: true, alone: true,
		outcome: "all are answered: requests wait in line for `max_connections`", run: manyConnections},
	{name: "no file descriptors left", outcome: "502 `connection` for requests that need a new one; all is well when there are some again", run: noDescriptors},
	{name: "standard output on a full disk", outcome: "requests are served as ever; their log lines are lost", run: func(s *scene) {
		s.withoutLog(">/dev/full")
	}},
	{name: "standard output closed", outcome: "requests are served as ever; their log lines are lost", run: func(s *scene) {
		s.withoutLog(">&-")
	}},
	{name: "standard output whose reader has gone", outcome: "requests are served as ever; their log lines are lost", run: func(s *scene) {
		reader := s.logToPipe()
		reader.Close()
		s.passedAll(100)
	}},
	{name: "standard output that nobody reads", outcome: "requests are served as ever; lines beyond 1 MiB are dropped, and counted", run: func(s *scene) {
		defer s.logToPipe().Close()
		s.passedAll(3000)
		if dropped := proxytest.Scrape(s.T, s.Proxy).Value("proxy_log_lines_dropped_total"); dropped < 100 {
			s.Errorf("%v lines were dropped, want more than a hundred", dropped)
		}
	}},
	{name: "5 % of one processor", release: true, alone: true, outcome: "slow, and nothing else: all requests succeed", run: throttled},
}

// server is an ordinary upstream, over plain HTTP.
func (s *scene) server(handler http.HandlerFunc) string {
	s.Helper()
	return s.API(fakeanthropic.Plaintext, handler).URL
}

// count answers with the number of bytes that came.
func count(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	fmt.Fprint(w, n)
}

// posted is what count answers to [proxytest.Scene.Post].
var posted = fmt.Sprint(len(proxytest.Message))

// zeros is a body of n bytes that needs no memory.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// upload sends n bytes of declared length, over a connection of its own.
func (s *scene) upload(n int64) proxytest.Answer {
	req := s.Request("POST", "/v1/messages", zeros(n))
	req.ContentLength = n
	a, err := proxytest.Ask(&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialSmall}}, req)
	if err != nil {
		s.Errorf("an upload failed: %v", err)
		a.Response = &http.Response{} // which no check likes
	}
	return a
}

// dialSmall opens a connection whose send buffer is small. Left alone, each of a thousand clients that wait would hold 2.5 MiB of
// the kernel's memory, more than a machine of some GiB has for all of its TCP: those that are served would crawl.
func dialSmall(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err == nil {
		err = conn.(*net.TCPConn).SetWriteBuffer(64 << 10)
	}
	return conn, err
}

// contained runs the proxy in a container of 128 MiB, with a limit as k8s/deployment.yaml has it.
func (s *scene) contained(upstream, config string, env ...string) {
	s.Helper()
	s.Launch(proxytest.Options{MemoryMiB: 128, Args: proxytest.Serve(upstream), Config: config, Env: append(env, "GOMEMLIMIT=96MiB")})
}

// peaked tells how much of the container's memory was used.
func (s *scene) peaked() {
	s.Helper()
	s.Logf("at most %d MiB of 128", proxytest.Must(s.Proxy.PeakMiB())(s.T))
}

func manyUploads(s *scene) {
	const uploads, size = 1000, 10 * mib
	s.contained(s.server(count), "")
	began := time.Now()
	s.crowd(uploads, 1, func() proxytest.Answer { return s.upload(size) }, isPassed(200, fmt.Sprint(size)))
	s.Logf("%d uploads of 10 MiB in %v", uploads, time.Since(began).Round(time.Millisecond))
	s.peaked()
}

// drips has a client send n bytes each second, until stop is called.
func (s *scene) drips(c *proxytest.RawClient, n int) (stop func()) {
	ticker, done := time.NewTicker(time.Second), make(chan struct{})
	var dripping sync.WaitGroup
	dripping.Go(func() {
		for {
			select {
			case <-done:
				return
			case <-ticker.C:
				c.Say(strings.Repeat("x", n))
			}
		}
	})
	return func() { ticker.Stop(); close(done); dripping.Wait() }
}

func slowUploads(s *scene) {
	const slow = 5
	s.Start(s.server(count), "[proxy]\nbody_memory_mb = 24\n")
	var stops []func()
	for range slow {
		c := s.Say(message("Content-Length: 10485760", "", ""))
		stop := s.drips(c, 10<<10)
		stops = append(stops, func() { stop(); c.Reset() })
	}
	s.Queued(slow - 2)
	took := s.crowd(10, 5, func() proxytest.Answer { return s.upload(mib) }, isPassed(200, fmt.Sprint(mib)))
	slices.Sort(took)
	if s.Failed() {
		return
	}
	s.Logf("an upload of 1 MiB took %v, at most %v", took[len(took)/2], took[len(took)-1])
	if p50 := took[len(took)/2]; p50 > time.Second {
		s.Errorf("half of the uploads took more than %v", p50)
	}
	for _, stop := range stops {
		stop()
		s.Expect(left(0))
	}
}

func manyConnections(s *scene) {
	const connections, places = 5000, 1000
	var waiting atomic.Int32
	full := make(chan struct{})
	goOn := sync.OnceFunc(func() { close(full) })
	pace := time.Tick(time.Second / 4000) // of the log, which this process has to read
	s.Start(s.server(func(w http.ResponseWriter, r *http.Request) {
		n := waiting.Add(1)
		defer waiting.Add(-1)
		if n == places {
			goOn()
		} else if n > places {
			s.Errorf("%d requests are at the upstream at once, want %d", n, places)
		}
		<-full
		<-pace
		io.WriteString(w, "ok")
	}), "[proxy]\nmax_connections = 1000\n")
	// Whoever is idle for a second makes room: between connecting and asking, nobody may wait behind 5,000 goroutines.
	var dialling sync.Mutex
	s.crowd(connections, 1, func() (a proxytest.Answer) {
		dialling.Lock()
		c, err := proxytest.Dial(s.Context(), s.Proxy.Addr(), nil)
		dialling.Unlock()
		if err == nil {
			defer c.Close()
			a.Response, err = c.Send([]byte(message("Content-Length: 2", "Connection: close", "", "{}")))
		}
		if err != nil {
			return proxytest.Answer{Response: &http.Response{}, Err: err}
		}
		body, err := io.ReadAll(a.Body)
		return proxytest.Answer{Response: a.Response, Text: string(body), Err: err}
	}, isPassed(200, "ok"))
}

func noDescriptors(s *scene) {
	s.Launch(proxytest.Options{
		Before: "ulimit -n 40",
		Args:   proxytest.Serve(s.server(count)),
	})
	first := s.Say("GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
	first.Answer() // it is accepted
	for range 60 {
		defer s.Dial().Close()
	}
	proxytest.Must(s.Proxy.WaitLine("an accept that fails", proxytest.Timeout, func(l proxytest.Line) bool {
		return strings.Contains(l.Message(), "too many open files")
	}))(s.T)
	first.Say(message("Content-Length: 2", "Connection: close", "", "{}"))
	s.Refused(first.Answer(), 502, "connection", 2, "too many open files")
}

// withoutLog runs a proxy whose log lines can't be written, and sends requests.
func (s *scene) withoutLog(redirect string) {
	s.Helper()
	s.Mute = true
	s.Launch(proxytest.Options{Redirect: redirect, Args: proxytest.Serve(s.server(count))})
	s.passedAll(100)
}

// passedAll sends n requests, one after the other.
func (s *scene) passedAll(n int) {
	s.Helper()
	for range n {
		s.Passed(s.Post(), 200, posted, 1)
	}
}

// logToPipe starts the proxy with a pipe as its standard output, which nobody reads, and returns the reader's end.
func (s *scene) logToPipe() (reader *os.File) {
	s.Helper()
	path := filepath.Join(s.TempDir(), "log")
	proxytest.Check(s.T, syscall.Mkfifo(path, 0o600))
	reader = proxytest.Must(os.OpenFile(path, os.O_RDWR, 0))(s.T) // does not wait for a writer
	s.withoutLog(">'" + path + "'")
	return reader
}

func throttled(s *scene) {
	const requests = 40
	began := time.Now()
	s.Launch(proxytest.Options{CPUs: 0.05, Args: proxytest.Serve(s.server(count))})
	s.Logf("Running after %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	s.crowd(4, requests/4, func() proxytest.Answer { return s.Send("POST", "/v1/messages", zeros(2<<10)) }, isPassed(200, "2048"))
	s.Logf("%d requests in %v", requests, time.Since(began).Round(time.Millisecond))
}
