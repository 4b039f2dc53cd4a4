//go:build vm

package memory

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// heldBack is a header of 50 KiB, without its end.
var heldBack = "GET / HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("a:"+strings.Repeat("b", 200)+"\r\n", 250)

// TestClosedLoop: 1,000 clients with bodies of 50 KB, three each, one after the other.
func TestClosedLoop(t *testing.T) {
	b := newBox(t)
	b.all(1000, func(int) (err error) {
		client := b.client()
		for posts := 0; posts < 3 && err == nil; posts++ {
			err = b.patiently(func() error { return b.post(1, client, count, 50_000) })
		}
		return err
	})
}

// TestUploads: 1,000 at once, of an eighth of a MiB, and some of the largest.
func TestUploads(t *testing.T) {
	b := newBox(t)
	b.all(1000, func(i int) error {
		n := mib / 8
		if i%100 == 0 {
			n = 10 * mib
		}
		return b.patiently(func() error { return b.post(1, b.client(), count, n) })
	})
}

// TestManyFields: 600 complete requests of 11,000 short header lines.
func TestManyFields(t *testing.T) {
	b := newBox(t)
	request := "GET /held HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("a:\r\n", 11_000) + "\r\n"
	b.all(600, func(int) error {
		conn, err := b.dial(request)
		if err != nil {
			return err
		}
		defer conn.Close()
		return answered(conn, 431)
	})
	if peak := b.memory("peak"); peak > 64*mib {
		t.Errorf("%d MiB for headers of which 256 lines are read", peak/mib)
	}
}

// TestQueued: 3,000 requests of 50 KB behind slow answers, far more than are accepted.
func TestQueued(t *testing.T) {
	b := newBox(t)
	request := "POST " + slow + " HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n" + strings.Repeat("x", 50_000)
	connecting := make(chan struct{}, 50) // at a time: on this processor others would be idle for a second before they speak
	b.all(3000, func(int) error {
		return b.patiently(func() error {
			connecting <- struct{}{}
			conn, err := b.dial(request)
			<-connecting
			if err != nil {
				return err
			}
			defer conn.Close()
			return answered(conn, 200)
		})
	})
}

// TestSilent: 12,000 connections that say nothing and 125 that hold back a header, beside honest clients, for as long as they come.
func TestSilent(t *testing.T) {
	b := newBox(t)
	coming, end := context.WithCancel(t.Context())
	go func() { b.hold(125, heldBack); b.hold(12_000, ""); end() }()
	b.all(10, func(int) (err error) {
		client := b.client()
		for err = b.post(5, client, count, 50_000); coming.Err() == nil && err == nil; {
			err = b.post(1, client, count, 50_000)
		}
		return err
	})
}

// TestStillReaders: of answers of 8 MiB. 50 of them are whole when they are read on; of 400 more, most are cut.
func TestStillReaders(t *testing.T) {
	b := newBox(t)
	const readers = 50
	var answers []*net.TCPConn
	for range readers {
		answers = append(answers, b.stillReader())
	}
	time.Sleep(10 * time.Second)
	on := answers[readers/2]
	on.SetReadBuffer(mib)
	proxytest.Check(t, answered(on, 200))
	for range 400 {
		b.stillReader()
	}
	time.Sleep(10 * time.Second)
	proxytest.Check(t, b.post(1, b.client(), count, 10))
}

// TestLargeResponseHeaders: 100 answers at once with 200 KiB of headers.
func TestLargeResponseHeaders(t *testing.T) {
	b := newBox(t)
	b.all(100, func(int) error { return b.post(1, b.client(), headers, 10) })
}

// TestMixed: all that clients do by accident or on purpose, and a log reader that hangs, at once for a minute, beside honest
// streams and uploads.
func TestMixed(t *testing.T) {
	const pipe = "/tmp/log"
	proxytest.Check(t, syscall.Mkfifo(pipe, 0o600))
	reader := proxytest.Must(os.OpenFile(pipe, os.O_RDWR, 0))(t) // without one, the proxy could not begin to write
	t.Cleanup(func() { reader.Close() })
	b := newBox(t, pipe)
	for range 50 {
		b.stillReader()
	}
	go b.hold(500, "")
	go b.hold(125, heldBack)
	for range 5 {
		go func() { // 10 MiB at 10 KiB/s, until it is refused
			conn, err := b.dial("POST " + count + " HTTP/1.1\r\nHost: x\r\nContent-Length: 10485760\r\n\r\n")
			for ; err == nil; time.Sleep(time.Second) {
				_, err = conn.Write(make([]byte, 10<<10))
			}
		}()
	}
	long := count + strings.Repeat("/", 300) // the lines are more than 1 MiB
	b.all(30, func(int) error { return b.post(60, b.client(), long, 10) })
	start := time.Now()
	during := func(what string, do func() error) func() error {
		return func() error {
			for time.Since(start) < time.Minute {
				if err := do(); err != nil {
					return fmt.Errorf("%s: %w", what, err)
				}
			}
			return nil
		}
	}
	var worst time.Duration // of /health
	probe := b.client()
	clients := []func() error{
		during("a probe", func() error {
			time.Sleep(time.Second)
			asked := time.Now()
			defer func() { worst = max(worst, time.Since(asked)) }()
			return b.ask(probe, "GET", "http://"+health+"/health", 0, "")
		}),
	}
	for range 10 {
		client := b.client()
		clients = append(clients, during("an upload", func() error { return b.post(1, client, count, mib) }))
	}
	for range 20 {
		clients = append(clients, func() error { return b.ask(b.client(), "GET", url+stream, 0, strings.Repeat(event, streamEvents)) })
	}
	b.all(len(clients), func(i int) error { return clients[i]() })
	b.Logf("/health took %v at most", worst)
	if worst > 5*time.Second {
		b.Errorf("/health took %v", worst)
	}
	b.letGo()
	proxytest.Eventually(t, "memory below 100 MiB", func() bool { return b.memory("current") < 100*mib })
	if m := proxytest.Scrape(t, b.Proxy); m.Value("proxy_log_lines_dropped_total") == 0 {
		b.Errorf("of %v requests no line was dropped: the log was read, or is not full", m.Value("proxy_requests_total"))
	}
}
