package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A client has one connection, which speaks HTTP/1.1, as the clients of the real proxy do, in the least way: clients share the
// machine with the target.
type client struct {
	*proxytest.Client
	target *target
	phase  float64              // where it is among all clients, from 0 to 1
	due    func() time.Duration // tells, once for each request, when it is to be sent
}

// dial opens a connection that lasts as long as ctx.
func (t *target) dial(ctx context.Context) (*proxytest.Client, error) {
	var config *tls.Config
	if t.name == direct {
		config = &tls.Config{InsecureSkipVerify: true} // it is this very process
	}
	return proxytest.Dial(ctx, t.addr, config)
}

// schedule returns a client's due. The times of a rate are random, and the same for everyone; without, they are at once.
func schedule(rate float64) func() time.Duration {
	if rate == 0 {
		return func() time.Duration { return time.Since(clock) }
	}
	random := rand.New(rand.NewPCG(1, 2))
	var mu sync.Mutex
	at := time.Since(clock)
	return func() time.Duration {
		mu.Lock()
		defer mu.Unlock()
		at += time.Duration(random.ExpFloat64() / rate * float64(time.Second))
		return at
	}
}

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
func (c client) request(method, path string, bodySize int) []byte {
	betas := "claude-code-20250219," + clientBeta
	if c.target.name == direct {
		betas += "," + beta
	}
	head := fmt.Sprintf("%s %s HTTP/1.1\nhost: %s\n%santhropic-beta: %s\ncontent-length: %d\n\n",
		method, path, c.target.addr, sdkHeaders, betas, bodySize)
	return append([]byte(strings.ReplaceAll(head, "\n", "\r\n")), bytes.Repeat([]byte("x"), bodySize)...)
}

// send sends a request and returns its answer's body, if it is a good one.
func (c client) send(request []byte) (io.Reader, error) {
	resp, err := c.Send(request)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK || resp.Close {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 500)) // as far as it tells something
		return nil, fmt.Errorf("status %s, the connection is to be closed: %t, headers %v: %s",
			resp.Status, resp.Close, resp.Header, body)
	}
	return resp.Body, nil
}

// A session waits for a client's next answer, or event of a stream.
type session func() (sample, error)

// A sample says when an answer was due, or an event sent, by clock, and how long it took.
type sample struct{ begun, took time.Duration }

// exchange is a request that clients send over and over, and its answer.
type exchange struct {
	method     string
	path       string
	bodySize   int
	answerSize int64
}

// open begins with nothing: each answer has its own request. One that can't be sent when it is due has waited since.
func (e exchange) open(c client) (session, error) {
	request := c.request(e.method, e.path+"?beta=true", e.bodySize)
	return func() (sample, error) {
		due := c.due()
		time.Sleep(due - time.Since(clock))
		body, err := c.send(request)
		if err != nil {
			return sample{}, err
		}
		if n, err := io.Copy(io.Discard, body); err != nil || n != e.answerSize {
			return sample{}, fmt.Errorf("reading an answer: %d bytes of %d, error %v", n, e.answerSize, err)
		}
		return sample{due, time.Since(clock) - due}, nil
	}, nil
}

// stream opens an event stream, which has no end. Streams are out of step with each other.
func stream(c client) (session, error) {
	phase := time.Duration(c.phase * float64(eventInterval)) // when the first event is due
	body, err := c.send(c.request("POST", fmt.Sprintf("%s?beta=true&phase=%dns", streamPath, phase), 2<<10))
	if err != nil {
		return nil, err
	}
	lines := bufio.NewReaderSize(body, 1<<10)
	return func() (sample, error) {
		for {
			line, err := lines.ReadSlice('\n')
			if err != nil {
				return sample{}, fmt.Errorf("reading a stream: %w", err)
			}
			if sent, ok := parseEvent(line); ok {
				return sample{sent, time.Since(clock) - sent}, nil
			}
		}
	}, nil
}
