package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"gonum.org/v1/gonum/stat"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// clientBeta is a beta that clients send and that must survive.
const clientBeta = "interleaved-thinking-2025-05-14"

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
func (t *target) request(method, path string, bodySize int) []byte {
	betas := "claude-code-20250219," + clientBeta
	if t.name == direct {
		betas += "," + beta
	}
	head := fmt.Sprintf("%s %s HTTP/1.1\nhost: %s\n%santhropic-beta: %s\ncontent-length: %d\n\n", method, path, t.addr, sdkHeaders, betas, bodySize)
	return append([]byte(strings.ReplaceAll(head, "\n", "\r\n")), bytes.Repeat([]byte("x"), bodySize)...)
}

// connect opens n connections, which last as long as ctx. They speak HTTP/1.1, as the clients of the real proxy do, in the least
// way: they share the machine with the target.
func (t *target) connect(ctx context.Context, n int) ([]*proxytest.Client, error) {
	var config *tls.Config
	if t.name == direct {
		config = &tls.Config{RootCAs: t.upstream.roots, ServerName: serverName}
	}
	clients := make([]*proxytest.Client, n)
	return clients, each(n, func(i int) (err error) {
		clients[i], err = proxytest.Dial(ctx, t.addr, config)
		return err
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

// send sends a request and returns its answer's body, if it is a good one.
func send(c *proxytest.Client, request []byte) (io.Reader, error) {
	resp, err := c.Send(request)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || resp.Close {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 500)) // as far as it tells something
		return nil, fmt.Errorf("status %s, the connection is to be closed: %t, headers %v: %s", resp.Status, resp.Close, resp.Header, body)
	}
	return resp.Body, nil
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
func (e exchange) lap(t *target, clients []*proxytest.Client, d time.Duration) (figures, error) {
	before, err := t.cpu()
	if err != nil {
		return nil, err
	}
	request := t.request(e.method, e.path+"?beta=true", e.bodySize)
	latencies := make([][]float64, len(clients))
	begun := time.Now()
	next := e.due(begun, begun.Add(d))
	var working errgroup.Group
	for i, c := range clients {
		working.Go(func() error {
			for at, more := next(); more; at, more = next() {
				time.Sleep(time.Until(at))
				body, err := send(c, request)
				if err != nil {
					return err
				}
				if n, err := io.Copy(io.Discard, body); err != nil || n != e.answerSize {
					return fmt.Errorf("reading an answer: %d bytes of %d, error %v", n, e.answerSize, err)
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

// summary returns the number of latencies and, if there are any, their percentiles.
func summary(byClient [][]float64) (n float64, measured figures) {
	all := slices.Concat(byClient...)
	if len(all) == 0 {
		return 0, nil
	}
	slices.Sort(all)
	return float64(len(all)), figures{p50: stat.Quantile(0.5, stat.Empirical, all, nil), p99: stat.Quantile(0.99, stat.Empirical, all, nil)}
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
