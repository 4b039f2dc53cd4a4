//go:build faults

package faults

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

const mib = 1 << 20

// resourceFaults are those of a machine that has not enough of something.
var resourceFaults = []fault{
	{name: "1,000 uploads of 10 MiB at once, in a container of 128 MiB", release: true, alone: true,
		outcome: "all succeed: bodies wait in line for `body_memory_mb`", run: manyUploads},
	{name: "an upload of 1 KiB/s that holds the memory that others wait for",
		outcome: "408 `request_timeout` after 10 s below 8 KiB/s; the others go on", run: slowUpload},
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
		if dropped := proxytest.Scrape(s.T, s.proxy).Value("proxy_log_lines_dropped_total"); dropped < 100 {
			s.Errorf("%v lines were dropped, want more than a hundred", dropped)
		}
	}},
	{name: "50 readers of answers of 8 MiB that stand still, in a container of 128 MiB", release: true, alone: true,
		outcome: "the API is kept from sending ahead; the answers are whole when they read on", run: stillReaders},
	{name: "5 % of one processor", release: true, alone: true, outcome: "slow, and nothing else: all requests succeed", run: throttled},
}

// server is an ordinary upstream, over plain HTTP.
func (s *scene) server(handler http.HandlerFunc) string {
	up := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/plain" {
			io.WriteString(w, "plain")
			return
		}
		handler(w, r)
	}))
	s.Cleanup(up.Close)
	s.hangUp = up.CloseClientConnections
	return up.URL
}

// count answers with the number of bytes that came.
func count(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	fmt.Fprint(w, n)
}

// zeros is a body of n bytes that needs no memory.
func zeros(n int64) io.Reader { return io.LimitReader(zeroReader{}, n) }

type zeroReader struct{}

func (zeroReader) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// upload sends n bytes of declared length, over a connection of its own.
func (s *scene) upload(n int64) (answer, error) {
	req, err := http.NewRequestWithContext(s.Context(), "POST", s.proxy.URL()+"/v1/messages", zeros(n))
	if err != nil {
		return answer{}, err
	}
	req.ContentLength = n
	req.Close = true
	return ask(&http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: dialSmall}}, req)
}

// dialSmall opens a connection whose send buffer is small. Left alone, each of a thousand
// clients that wait would hold 2.5 MiB of the kernel's memory, more than a machine of
// some GiB has for all of its TCP: those that are served would crawl.
func dialSmall(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, addr)
	if err == nil {
		err = conn.(*net.TCPConn).SetWriteBuffer(64 << 10)
	}
	return conn, err
}

func manyUploads(s *scene) {
	const uploads, size = 1000, 10 * mib
	group := s.cgroup("memory")
	group.set([2]string{"memory.limit_in_bytes", "128M"}, [2]string{"memory.max", "128M"})
	s.launch(proxytest.Options{
		Binary: s.wrapped(group.enter(), ""),
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", s.server(count)},
		Env:    []string{"GOMEMLIMIT=96MiB"}, // as k8s/deployment.yaml has it
	})
	began := time.Now()
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range uploads {
		clients.Go(func() {
			a, err := s.upload(size)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				s.Errorf("an upload failed: %v", err)
				return
			}
			s.passed(a, 200, fmt.Sprint(size), 1)
		})
	}
	clients.Wait()
	s.Logf("%d uploads of 10 MiB in %v; at most %d MiB of 128", uploads, time.Since(began).Round(time.Millisecond), group.peak())
}

func slowUpload(s *scene) {
	s.start(s.server(count), "[proxy]\nbody_memory_mb = 1\nmax_body_mb = 1\n")
	slow, err := net.Dial("tcp", s.proxy.Addr())
	if err != nil {
		s.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprintf(slow, "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", mib)
	s.gauge("proxy_buffered_body_bytes", mib)
	stop := make(chan struct{})
	var dripping sync.WaitGroup
	dripping.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Second):
				slow.Write(make([]byte, 1<<10))
			}
		}
	})
	began := time.Now()
	a, err := s.upload(mib)
	if err != nil {
		s.Fatal(err)
	}
	s.passed(a, 200, fmt.Sprint(mib), 1)
	if took := time.Since(began); took > 25*time.Second {
		s.Errorf("the other upload waited %v, want 10 to 20 s", took)
	}
	close(stop)
	dripping.Wait()
	said := make([]byte, 12)
	io.ReadFull(slow, said)
	if string(said) != "HTTP/1.1 408" {
		s.Errorf("the slow upload is answered with %q, want 408", said)
	}
	s.expect(line{status: 408, attempts: 0, err: "request_timeout"})
}

func slowUploads(s *scene) {
	const slow, clients, each = 5, 10, 5
	s.start(s.server(count), "[proxy]\nbody_memory_mb = 24\n")
	stop := make(chan struct{})
	var dripping sync.WaitGroup
	for range slow {
		c := s.dialAndSay(message("Content-Length: 10485760", "", ""))
		dripping.Go(func() {
			for {
				select {
				case <-stop:
					c.reset()
					return
				case <-time.After(time.Second):
					c.say(strings.Repeat("x", 10<<10))
				}
			}
		})
	}
	s.gauge("proxy_requests_queued", slow-2)
	var mu sync.Mutex
	var took []time.Duration
	var honest sync.WaitGroup
	for range clients {
		honest.Go(func() {
			for range each {
				began := time.Now()
				a, err := s.upload(mib)
				if err != nil {
					s.Error(err)
					return
				}
				mu.Lock()
				took = append(took, time.Since(began))
				s.passed(a, 200, fmt.Sprint(mib), 1)
				mu.Unlock()
			}
		})
	}
	honest.Wait()
	slices.Sort(took)
	if s.Failed() {
		return
	}
	s.Logf("an upload of 1 MiB took %v, at most %v", took[len(took)/2], took[len(took)-1])
	if p50 := took[len(took)/2]; p50 > time.Second {
		s.Errorf("half of the uploads took more than %v", p50)
	}
	close(stop)
	dripping.Wait()
	for range slow {
		s.expect(line{status: 499, attempts: 0, err: "the client left"})
	}
}

func manyConnections(s *scene) {
	const connections, places = 5000, 1000
	var waiting, most atomic.Int32
	full := make(chan struct{})
	s.start(s.server(func(w http.ResponseWriter, r *http.Request) {
		n := waiting.Add(1)
		defer waiting.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		if n == places {
			close(full)
		}
		<-full
		io.WriteString(w, "ok")
	}), "[proxy]\nmax_connections = 1000\n")
	var failed atomic.Int32
	var clients sync.WaitGroup
	request := []byte("POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
	for range connections {
		clients.Go(func() {
			conn, err := net.Dial("tcp", s.proxy.Addr())
			if err != nil {
				failed.Add(1)
				return
			}
			defer conn.Close()
			conn.Write(request)
			if got, _ := io.ReadAll(conn); !bytes.HasPrefix(got, []byte("HTTP/1.1 200 OK")) || !bytes.HasSuffix(got, []byte("\r\n\r\nok")) {
				failed.Add(1)
			}
		})
	}
	clients.Wait()
	for range connections {
		s.expect(line{status: 200, attempts: 1})
	}
	if failed.Load() > 0 {
		s.Errorf("%d of %d connections failed", failed.Load(), connections)
	}
	if got := most.Load(); got != places {
		s.Errorf("%d requests were at the upstream at once, want %d", got, places)
	}
}

func noDescriptors(s *scene) {
	s.launch(proxytest.Options{
		Binary: s.wrapped("ulimit -n 40", ""),
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", s.server(count)},
		Config: quick,
	})
	first, err := net.Dial("tcp", s.proxy.Addr())
	if err != nil {
		s.Fatal(err)
	}
	conns := []net.Conn{first}
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	if _, err := io.WriteString(first, "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		s.Fatal(err)
	}
	io.ReadFull(first, make([]byte, 1)) // it is accepted
	for range 60 {
		conn, err := net.Dial("tcp", s.proxy.Addr())
		if err != nil {
			s.Fatal(err)
		}
		conns = append(conns, conn)
	}
	if _, err := s.proxy.WaitLine("an accept that fails", proxytest.Timeout, func(l proxytest.Line) bool {
		return strings.Contains(l.Message(), "too many open files")
	}); err != nil {
		s.Fatal(err)
	}
	io.WriteString(first, "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
	if got, _ := io.ReadAll(first); !strings.Contains(string(got), "HTTP/1.1 502 ") || !strings.Contains(string(got), `"code":"connection"`) {
		s.Errorf("the request that needs a descriptor got %.300q, want 502", got)
	}
	s.expect(line{status: 502, attempts: 2, errorType: "connection", err: "too many open files"})
}

// withoutLog runs a proxy whose log lines can't be written, and sends requests.
func (s *scene) withoutLog(redirect string) {
	s.Helper()
	p, err := proxytest.Start(proxytest.Options{
		Binary: s.wrapped("", redirect),
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", s.server(count)},
		Env:    []string{"GORACE=halt_on_error=1"},
	})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { p.Stop() })
	s.proxy, s.mute = p, true
	if err := p.WaitListening(proxytest.Timeout); err != nil {
		s.Fatal(err)
	}
	s.before = s.usage()
	s.passedAll(100)
}

// passedAll sends n requests, one after the other.
func (s *scene) passedAll(n int) {
	s.Helper()
	for range n {
		s.passed(s.post(), 200, "18", 1)
	}
}

// logToPipe starts the proxy with a pipe as its standard output, which nobody reads, and returns the reader's end.
func (s *scene) logToPipe() (reader *os.File) {
	s.Helper()
	path := filepath.Join(s.TempDir(), "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		s.Fatal(err)
	}
	reader, err := os.OpenFile(path, os.O_RDWR, 0) // does not wait for a writer
	if err != nil {
		s.Fatal(err)
	}
	s.withoutLog(">'" + path + "'")
	return reader
}

func stillReaders(s *scene) {
	const readers, size = 50, 8 * mib
	ca := newAuthority(s)
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/plain" {
			io.WriteString(w, "plain")
			return
		}
		io.Copy(w, zeros(size))
	}))
	up.EnableHTTP2, up.TLS = true, &tls.Config{Certificates: []tls.Certificate{ca.certificate(nil)}}
	up.StartTLS()
	s.Cleanup(up.Close)
	s.hangUp = up.CloseClientConnections
	group := s.cgroup("memory")
	group.set([2]string{"memory.limit_in_bytes", "128M"}, [2]string{"memory.max", "128M"})
	s.launch(proxytest.Options{
		Binary: s.wrapped(group.enter(), ""),
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", up.URL},
		Config: "[proxy]\nbody_memory_mb = 24\n", // as k8s/ has it
		Env:    []string{"GOMEMLIMIT=96MiB", ca.env()},
	})
	var answers []*http.Response
	for range readers {
		resp, err := s.client.Get(s.proxy.URL() + "/v1/messages")
		if err != nil {
			s.Fatal(err)
		}
		answers = append(answers, resp)
	}
	time.Sleep(3 * time.Second) // for all that may come ahead
	for _, resp := range answers {
		n, err := io.Copy(io.Discard, resp.Body)
		if resp.Body.Close(); n != size || err != nil {
			s.Errorf("%d bytes of an answer came (%v), want %d", n, err, size)
		}
		s.expect(line{status: 200, attempts: 1})
	}
	s.Logf("at most %d MiB of 128", group.peak())
}

func throttled(s *scene) {
	const requests = 40
	group := s.cgroup("cpu")
	group.set([2]string{"cpu.cfs_quota_us", "5000"}, [2]string{"cpu.max", "5000 100000"})
	began := time.Now()
	s.launch(proxytest.Options{
		Binary: s.wrapped(group.enter(), ""),
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", s.server(count)},
	})
	s.Logf("Running after %v", time.Since(began).Round(time.Millisecond))
	began = time.Now()
	var mu sync.Mutex
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range requests / 4 {
				a, err := s.send("POST", "/v1/messages", zeros(2<<10))
				mu.Lock()
				if err != nil {
					s.Errorf("a request failed: %v", err)
				} else {
					s.passed(a, 200, "2048", 1)
				}
				mu.Unlock()
			}
		})
	}
	clients.Wait()
	s.Logf("%d requests in %v", requests, time.Since(began).Round(time.Millisecond))
}
