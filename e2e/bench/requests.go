package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// clientBeta is a beta that clients send and that must survive.
const clientBeta = "interleaved-thinking-2025-05-14"

// phaseHeader tells the upstream when a stream's first event is due, as a fraction of eventInterval.
const phaseHeader = "x-bench-phase"

// sdkHeaders are what Anthropic's SDKs send beside length and betas.
const sdkHeaders = `accept: application/json
accept-encoding: gzip, deflate, br, zstd
anthropic-version: 2023-06-01
authorization: Bearer not-a-token-just-as-long-as-one-0123456789-0123456789-0123456789-0123456789
content-type: application/json
user-agent: bench/1.0 (loopback)
x-app: cli
x-stainless-arch: x64
x-stainless-lang: js
x-stainless-os: Linux
x-stainless-retry-count: 0
x-stainless-runtime: node
x-stainless-timeout: 600
`

// request returns a request as Anthropic's SDKs write it. For direct it has the beta that otherwise the contestant adds.
func (t *target) request(method, path string, bodySize int, phase float64) []byte {
	betas := "claude-code-20250219," + clientBeta
	if t.name == direct {
		betas += "," + beta
	}
	head := fmt.Sprintf("%s %s?beta=true HTTP/1.1\nhost: %s\n%santhropic-beta: %s\n%s: %.4f\ncontent-length: %d\n\n",
		method, path, t.addr, sdkHeaders, betas, phaseHeader, phase, bodySize)
	return append([]byte(strings.ReplaceAll(head, "\n", "\r\n")), bytes.Repeat([]byte("x"), bodySize)...)
}

// A client is one connection to a target. It speaks HTTP/1.1, as the clients of the real proxy do, and does little else: it shares
// the machine with the target.
type client struct {
	conn net.Conn
	in   *bufio.Reader
}

// connect opens n connections, which last as long as ctx.
func (t *target) connect(ctx context.Context, n int) ([]*client, error) {
	all := make([]*client, n)
	return all, each(n, func(i int) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", t.addr)
		if err != nil {
			return err
		}
		if t.name == direct {
			conn = tls.Client(conn, &tls.Config{RootCAs: t.upstream.roots, ServerName: serverName})
		}
		context.AfterFunc(ctx, func() { conn.Close() })
		all[i] = &client{conn, bufio.NewReader(conn)}
		return nil
	})
}

// each calls f with 0 to n-1, some at a time.
func each(n int, f func(i int) error) error {
	var group errgroup.Group
	group.SetLimit(32)
	for i := range n {
		group.Go(func() error { return f(i) })
	}
	return group.Wait()
}

// send sends a request and waits for the headers of its answer, which has to be a good one.
func (c *client) send(request []byte) (*http.Response, error) {
	if _, err := c.conn.Write(request); err != nil {
		return nil, fmt.Errorf("sending a request: %w", err)
	}
	resp, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return nil, fmt.Errorf("reading an answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK || resp.Close {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 500)) // as far as it tells something
		return nil, fmt.Errorf("status %s, the connection is to be closed: %t, headers %v: %s", resp.Status, resp.Close, resp.Header, body)
	}
	return resp, nil
}

// do sends a request and reads its answer, whose body has to be of size bytes.
func (c *client) do(request []byte, size int64) error {
	resp, err := c.send(request)
	if err != nil {
		return err
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if err == nil && n != size {
		err = fmt.Errorf("reading an answer: %d bytes, want %d", n, size)
	}
	return err
}

// exchange is what clients do over and over: a request and its answer.
type exchange struct {
	method     string
	path       string
	bodySize   int
	answerSize int64
	conns      int     // clients at once, each with a connection of its own
	rate       float64 // requests a second, at random times; 0: each client sends as soon as its last was answered
}

// small is what most of the work is measured with.
func small(conns int) exchange {
	return exchange{"POST", smallPath, 2 << 10, smallAnswerSize, conns, 0}
}

// large is a large request or answer, over four connections: the proxy buffers requests, and four of 10 MiB fit its budget.
func large(method, path string, bodySize int, answerSize int64) exchange {
	return exchange{method, path, bodySize, answerSize, 4, 0}
}

// offered offers percent of what the first contestant with a quota does when clients ask again as soon as they are answered.
// Requests that come one by one cost more than those of a queue that is never empty: the quota shows.
func offered(percent float64) runner {
	return func(ctx context.Context, t *target, d time.Duration) (figures, error) {
		if t.fullRate == 0 {
			full, err := small(32).run(ctx, t, d)
			if err != nil {
				return nil, err
			}
			t.fullRate = full[perSecond]
		}
		e := small(256)
		e.rate = t.fullRate * percent / 100
		return e.run(ctx, t, 2*d)
	}
}

// run warms t up and then measures for d; it returns the figures of requestColumns, quotaColumns and transferColumns.
func (e exchange) run(ctx context.Context, t *target, d time.Duration) (figures, error) {
	clients, err := t.connect(ctx, e.conns)
	if err != nil {
		return nil, err
	}
	if _, err := e.lap(t, clients, time.Duration(warmUp*float64(d))); err != nil {
		return nil, err
	}
	return e.lap(t, clients, d)
}

// lap has all clients send requests for d. All begun requests count and are waited for.
func (e exchange) lap(t *target, clients []*client, d time.Duration) (figures, error) {
	before, err := t.cpu()
	if err != nil {
		return nil, err
	}
	request := t.request(e.method, e.path, e.bodySize, 0)
	latencies := make([][]float64, len(clients))
	begun := time.Now()
	next := e.due(begun, begun.Add(d))
	var working errgroup.Group
	for i, c := range clients {
		working.Go(func() error {
			for at, more := next(); more; at, more = next() {
				time.Sleep(time.Until(at))
				if err := c.do(request, e.answerSize); err != nil {
					return err
				}
				latencies[i] = append(latencies[i], milliseconds(time.Since(at)))
			}
			return nil
		})
	}
	err = working.Wait()
	elapsed := time.Since(begun).Seconds()
	after, errCPU := t.cpu()
	if err := errors.Join(err, errCPU); err != nil {
		return nil, err
	}
	n, measured := summary(latencies)
	if n == 0 {
		return nil, errors.New("no request could be sent in time: this machine is too busy to measure")
	}
	cpu, size := after-before, float64(max(int64(e.bodySize), e.answerSize))/1e6
	measured[cpuPerRequest], measured[perSecond] = cpu*1e6/n, n/elapsed
	measured[cpuPerMB], measured[megabytes] = cpu*1e3/size/n, size*n/elapsed
	measured[quotaUsed] = cpu / elapsed / quotaCPUs * 100
	return measured, nil
}

// due returns what tells, once for each request, when it is to be sent; false when that is not before end. A request that can't
// be sent then has waited since. The times of a rate are random, and the same for everyone.
func (e exchange) due(begun, end time.Time) func() (time.Time, bool) {
	if e.rate == 0 {
		return func() (time.Time, bool) { now := time.Now(); return now, now.Before(end) }
	}
	random := rand.New(rand.NewPCG(1, 2))
	var mu sync.Mutex
	at := begun
	return func() (time.Time, bool) {
		mu.Lock()
		defer mu.Unlock()
		at = at.Add(time.Duration(random.ExpFloat64() / e.rate * float64(time.Second)))
		return at, at.Before(end)
	}
}
