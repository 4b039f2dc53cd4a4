//go:build faults

package faults

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// clientFaults are what clients do to the proxy, by accident or on purpose.
var clientFaults = []fault{
	{name: "reads an answer slowly", outcome: "gets all of it: only a standstill for `timeout_secs` ends an answer", run: slowReader},
	{name: "reads an answer at 1 KiB/s, or not at all", run: stoppedReader,
		outcome: "cut when the kernel's buffer, of 64 KiB, has had no room for `timeout_secs`: 499 in the log, and the upstream's answer is cancelled"},
	{name: "vanishes in the middle of a header", outcome: "counts nowhere; the upstream hears nothing", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		s.Say(half).Reset()
		c := s.Say(half)
		c.TCP().CloseWrite()
		c.TurnedAway(400)
	})},
	{name: "vanishes in the middle of a body", outcome: "499 in the log; its memory is free, and the upstream hears nothing", run: echoes(onePlace, 0, vanishesUploading)},
	{name: "vanishes from the queue", outcome: "499 in the log; its place goes to the next one, and the upstream hears nothing", run: vanishesQueued},
	{name: "vanishes from the line for memory", outcome: "499 in the log; what it would have held goes to the next one, and the upstream hears nothing", run: vanishesWithoutMemory},
	{name: "vanishes while it waits for an answer", outcome: "499 in the log; the upstream's request is cancelled", run: func(s *scene) {
		s.vanishes(func(p *proxytest.Peer) { p.Request() }, func(*proxytest.RawClient) {})
	}},
	{name: "vanishes in the middle of a stream", outcome: "499 in the log; the upstream's stream is cancelled, a silent one too", run: func(s *scene) {
		s.vanishes(func(p *proxytest.Peer) {
			p.Request()
			p.Say(proxytest.Chunked(proxytest.Event))
		}, func(c *proxytest.RawClient) {
			for !strings.HasPrefix(proxytest.Must(c.R.ReadString('\n'))(s.T), "data: ") {
			}
		})
	}},
	{name: "vanishes just before an attempt is repeated", outcome: "499 in the log; it is not repeated", run: vanishesBetweenAttempts},
	{name: "sends requests ahead of the answers", outcome: "each is answered in order, and reaches the upstream once", run: echoes("", 200, pipelines)},
	{name: "declares two lengths", outcome: "400 from net/http; the upstream hears nothing", run: turnedAway(400, map[string]string{
		"two headers":         message("Content-Length: 2", "Content-Length: 3", "", "{}"),
		"a list":              message("Content-Length: 2, 3", "", "{}"),
		"two folded into one": message("Content-Length: 2", " 3", "", "{}"),
		"a sign":              message("Content-Length: +2", "", "{}"),
		"less than nothing":   message("Content-Length: -2", "", "{}"),
		"hexadecimal":         message("Content-Length: 0x2", "", "{}"),
		"more than 64 bits":   message("Content-Length: 18446744073709551618", "", "{}"),
	})},
	{name: "declares a length and sends chunks", outcome: "the chunks hold, and the connection is closed after the answer, as after any chunks: what follows is never read", run: echoes("", 2, func(s *scene, e *proxytest.Echo) {
		for _, length := range []string{"Content-Length: 4", "X-Length: none"} {
			c := s.Say(message(length, "Transfer-Encoding: chunked", "", "5\r\nhello\r\n0\r\n\r\n") + smuggled)
			s.Passed(c.Answer(), 200, "POST /v1/messages hello", 1)
			c.Closed()
		}
	})},
	{name: "sends chunks over HTTP/1.0, which has none", outcome: "the declared length holds, and the connection is closed after the answer", run: echoes("", 1, func(s *scene, e *proxytest.Echo) {
		c := s.Say("POST /v1/messages HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 5\r\n" +
			"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + smuggled)
		s.Passed(c.Answer(), 200, "POST /v1/messages 0\r\n\r\n", 1)
		c.Closed()
	})},
	{name: "names transfer codings other than chunked", outcome: "501 from net/http; the upstream hears nothing", run: turnedAway(501, map[string]string{
		"two":         message("Transfer-Encoding: gzip, chunked", "", chunks),
		"two headers": message("Transfer-Encoding: chunked", "Transfer-Encoding: chunked", "", chunks),
		"identity":    message("Transfer-Encoding: identity", "Content-Length: 2", "", "{}"),
		"a parameter": message("Transfer-Encoding: chunked;q=1", "", chunks),
		"quotes":      message(`Transfer-Encoding: "chunked"`, "", chunks),
	})},
	{name: "folds a header line", outcome: "the upstream gets one line", run: understood(
		message("X-Header: one", " two", "\tthree", "Content-Length: 2", "", "{}"), "POST /v1/messages {}", "one two three")},
	{name: "ends lines with LF alone", outcome: "understood; the upstream gets CRLF", run: understood(
		strings.ReplaceAll(message("X-Header: a", "Content-Length: 2", "", "{}"), "\r\n", "\n"), "POST /v1/messages {}", "a")},
	{name: "sends a request line that is none", outcome: "400 from net/http; the upstream hears nothing", run: turnedAway(400, map[string]string{
		"a greeting":             "hello\r\n\r\n",
		"a space in the target":  "GET /a b HTTP/1.1\r\nHost: x\r\n\r\n",
		"a bad escape in a path": "GET /%zz HTTP/1.1\r\nHost: x\r\n\r\n",
	})},
	{name: "sends header lines that are none", outcome: "400 from net/http; the upstream hears nothing", run: turnedAway(400, map[string]string{
		"a space before the colon": message("Transfer-Encoding : chunked", "", "0\r\n\r\n"),
		"no colon":                 message("X-Header", "", ""),
		"no name":                  message(": a", "", ""),
		"a name that is no token":  message("X(Header): a", "", ""),
		"CR in a value":            message("X-Header: a\rTransfer-Encoding: chunked", "", ""),
		"CR before CRLF":           message("X-Header: a\r", "", ""),
		"a vertical tab":           message("Transfer-Encoding: \vchunked", "", "0\r\n\r\n"),
		"NUL":                      message("X-Header: a\x00b", "", ""),
		"a fold before any header": "GET / HTTP/1.1\r\n Host: x\r\n\r\n",
		"no host":                  "GET / HTTP/1.1\r\n\r\n",
		"a host that is none":      "GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
		"two hosts":                "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
	})},
	{name: "sends a header of more than 64 KiB, or of 1 MB", outcome: "431 from net/http", run: turnedAway(431, map[string]string{
		"72 KiB":     message(strings.TrimSpace(proxytest.HeaderLine("X-Large", 72<<10)), "", ""),
		"many lines": message(strings.Repeat("X-Line: "+strings.Repeat("x", 380)+"\r\n", 200), "", ""),
		"a value":    message(strings.TrimSpace(proxytest.HeaderLine("X-Large", mib)), "", ""),
		"a name":     message(strings.Repeat("x", mib)+": a", "", ""),
		"the target": "GET /" + strings.Repeat("x", mib) + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"no line":    strings.Repeat("x", mib),
	})},
	{name: "sends 100,000 headers, over 100 connections at once", release: true,
		outcome: "431 from net/http; a container of 128 MiB is large enough", run: manyHeaders},
	{name: "sends broken chunks", outcome: "400 `invalid_request`; the upstream hears nothing, and what follows is never read", run: brokenChunks(map[string]string{
		"a size that is no number":   "zz\r\nhello\r\n0\r\n\r\n",
		"a sign":                     "-5\r\nhello\r\n0\r\n\r\n",
		"a size as in programs":      "0x5\r\nhello\r\n0\r\n\r\n",
		"no size":                    "\r\nhello\r\n0\r\n\r\n",
		"a size of 68 bits":          "FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n",
		"more than the size":         "5\r\nhello, world\r\n0\r\n\r\n",
		"LF alone after the size":    "5\nhello\r\n0\r\n\r\n",
		"CR alone after the size":    "5\rhello\r\n0\r\n\r\n",
		"an extension of 64 KiB":     "5;" + strings.Repeat("x", 64<<10) + "\r\nhello\r\n0\r\n\r\n",
		"a thousand long extensions": strings.Repeat("1;"+strings.Repeat("x", 1000)+"\r\nh\r\n", 1000) + "0\r\n\r\n",
	})},
	{name: "sends too large a body, and asks for the end of its connection", outcome: "400 `invalid_request`, which it gets before the connection is reset", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		for range 20 {
			s.Refused(s.upload(10*mib+1), 400, "invalid_request", 0, "larger than 10 MiB")
		}
	})},
	{name: "sends a trailer of 1 MB, or a broken one", outcome: "400 `invalid_request`; the upstream hears nothing", run: brokenChunks(map[string]string{
		"large":   "5\r\nhello\r\n0\r\n" + proxytest.HeaderLine("X-Trailer", mib) + "\r\n",
		"no line": "5\r\nhello\r\n0\r\n" + strings.Repeat("x", mib),
		"broken":  "5\r\nhello\r\n0\r\nX-Trailer\r\n\r\n",
	})},
	{name: "names another server in the target", outcome: "the configured upstream gets it, with its own name and no other", run: understood(
		"GET http://elsewhere.invalid:81/v1/models?limit=1 HTTP/1.1\r\nHost: elsewhere.invalid:81\r\n\r\n", "GET /v1/models?limit=1 ", "")},
	{name: "sends CONNECT", outcome: "405; nothing is connected to", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		for _, target := range []string{"elsewhere.invalid:443", strings.TrimPrefix(e.URL, "http://")} {
			a := s.Say("CONNECT " + target + " HTTP/1.1\r\nHost: " + target + "\r\n\r\n").Answer()
			s.Refused(a, 405, "method_not_allowed", 0, "method_not_allowed")
			if allow := a.Header.Get("Allow"); !strings.Contains(allow, "POST") || strings.Contains(allow, "CONNECT") {
				s.Errorf("the client got Allow: %q, want what is allowed", allow)
			}
		}
	})},
	{name: "asks for a WebSocket", outcome: "served as if it had not: the wish ends here", run: echoes("", 1, func(s *scene, e *proxytest.Echo) {
		a := s.Say("GET /socket HTTP/1.1\r\nHost: x\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n" +
			"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n").Answer()
		s.Passed(a, 200, "GET /socket ", 1)
		got := e.Only().Header
		for _, name := range []string{"Connection", "Upgrade"} {
			if got[name] != nil || a.Header[name] != nil {
				s.Errorf("%s: the upstream got %q, and the client %q, want none", name, got[name], a.Header[name])
			}
		}
	})},
	{name: "waits for 100 Continue", outcome: "gets it from the proxy, but for a body that is too large; other expectations: 417 from net/http", run: echoes("", 1, expectations)},
	{name: "speaks HTTP/0.9, or a version to come", outcome: "400 or 505 from net/http", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		s.Say("GET /\r\n\r\n").TurnedAway(400)
		s.Say("GET / HTTP/0.9\r\nHost: x\r\n\r\n").TurnedAway(505)
		s.Say("GET / HTTP/2.0\r\nHost: x\r\n\r\n").TurnedAway(505)
		s.Say("GET / HTTP/11.1\r\nHost: x\r\n\r\n").TurnedAway(400)
	})},
	{name: "speaks HTTP/2 without having asked", outcome: "505; the upstream hears nothing", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		const preface, settings = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
		s.Say(preface + settings).TurnedAway(505)
	})},
	{name: "speaks TLS", outcome: "400 from net/http, in the clear: clients say so", run: echoes("", 0, func(s *scene, e *proxytest.Echo) {
		err := tls.Client(s.Dial(), &tls.Config{ServerName: "x"}).HandshakeContext(s.Context())
		record, ok := errors.AsType[tls.RecordHeaderError](err)
		if !ok || string(record.RecordHeader[:]) != "HTTP/" {
			s.Errorf("the handshake ends with %v, want an answer in plain HTTP", err)
		}
	})},
}

// smuggled is a request that nobody has sent, hidden behind another one.
const smuggled = "GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"

// hello is a whole request, half the beginning of one, and chunks are a body.
const (
	hello  = "POST /v1/messages HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
	half   = "POST /v1/messages HTTP/1.1\r\nHost: x\r\nX-Half: "
	chunks = "2\r\n{}\r\n0\r\n\r\n"
)

// message is a Messages request with these lines; the one after an empty one is the body.
func message(lines ...string) string {
	return "POST /v1/messages HTTP/1.1\r\nHost: x\r\n" + strings.Join(lines, "\r\n")
}

// echoes has f harm a proxy whose upstream answers with what it was asked. So many requests reach that.
func echoes(config string, reach int, f func(s *scene, e *proxytest.Echo)) func(*scene) {
	return func(s *scene) {
		e := s.Echo()
		s.Start(e.URL, config)
		f(s, e)
		e.Got(reach)
	}
}

// understood shows that an odd request reaches the upstream as a clean one, with this X-Header.
func understood(request, answer, header string) func(*scene) {
	return echoes("", 1, func(s *scene, e *proxytest.Echo) {
		s.Passed(s.Say(request).Answer(), 200, answer, 1)
		if got := e.Only().Header.Get("X-Header"); got != header {
			s.Errorf("the upstream got X-Header: %q, want %q", got, header)
		}
	})
}

// turnedAway shows that net/http itself refuses all of these.
func turnedAway(status int, requests map[string]string) func(*scene) {
	return echoes("", 0, func(s *scene, _ *proxytest.Echo) {
		for name, request := range requests {
			s.Log(name)
			s.Say(request).TurnedAway(status)
		}
	})
}

// brokenChunks shows that the proxy refuses requests with these bodies.
func brokenChunks(bodies map[string]string) func(*scene) {
	return echoes("", 0, func(s *scene, _ *proxytest.Echo) {
		for name, body := range bodies {
			s.Log(name)
			c := s.Say(message("Transfer-Encoding: chunked", "", body) + smuggled)
			s.Refused(c.Answer(), 400, "invalid_request", 0, "broken chunked encoding")
			c.Closed()
		}
	})
}

// flood is the length of an answer that is more than all the kernel's buffers on its way hold.
const flood = 64 * mib

// flooding runs an upstream that answers with a flood. The channel tells whether all of it could be sent.
func (s *scene) flooding() (u *proxytest.Upstream, sent <-chan bool) {
	s.Helper()
	ends := make(chan bool, 1)
	u = s.Upstream(func(p *proxytest.Peer) {
		for p.Request() != nil {
			ok := p.Say(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", flood))
			piece := strings.Repeat("x", mib)
			for n := 0; ok && n < flood; n += mib {
				ok = p.Say(piece)
			}
			ends <- ok
		}
	})
	return u, ends
}

// begins sends a request and reads the header of the answer, of whose body little is in the client's own buffers.
func (s *scene) begins(c *proxytest.RawClient) *http.Response {
	c.TCP().SetReadBuffer(32 << 10)
	return proxytest.Must(c.Send([]byte(hello)))(s.T)
}

func slowReader(s *scene) {
	const pace, lasting = 256 << 10, 9 * time.Second // each second, with timeout_secs = 4
	u, sent := s.flooding()
	s.Start(u.URL, hasty)
	c := s.Dial()
	resp := s.begins(c)
	read := int64(0)
	for began := time.Now(); time.Since(began) < lasting; time.Sleep(time.Second / 8) {
		n, err := io.CopyN(io.Discard, resp.Body, pace/8)
		if read += n; err != nil {
			s.Fatalf("the client got %d KiB in %v, and then %v", read>>10, time.Since(began), err)
		}
	}
	select {
	case <-sent:
		s.Error("all of the answer is in buffers: nothing was shown")
	default:
	}
	n, err := io.Copy(io.Discard, resp.Body)
	if read+n != flood || err != nil {
		s.Errorf("the client got %d bytes (%v), want %d", read+n, err, flood)
	}
	s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
}

func stoppedReader(s *scene) {
	u, sent := s.flooding()
	s.Start(u.URL, hasty)
	for _, pace := range []int64{1 << 10, 0} { // bytes each second
		c := s.Say("GET /plain HTTP/1.1\r\nHost: x\r\n\r\n")
		s.Passed(c.Answer(), 200, "plain", 1)
		resp := s.begins(c) // a second answer, for which net/http has taken the deadline of the first away
		began, read, whole := time.Now(), int64(0), false
		for cut := false; !cut; {
			select {
			case whole = <-sent:
				cut = true
			case <-time.After(time.Second):
				n, err := io.CopyN(io.Discard, resp.Body, pace)
				if read += n; err != nil || time.Since(began) > proxytest.Timeout {
					s.Fatalf("after %v the client got %d bytes more (%v), and the upstream goes on", time.Since(began), n, err)
				}
			}
		}
		if took := time.Since(began); took < 4*time.Second || whole {
			s.Errorf("the upstream could send all of its answer: %v, after %v, want it cancelled after 4 s at least", whole, took)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		if read+n >= flood || err == nil {
			s.Errorf("the client got %d bytes and then %v, want less than %d and a broken end", read+n, err, flood)
		}
		s.Expect(proxytest.Completed{Status: 499, Attempts: 1, Err: "the client stopped reading the answer"})
	}
}

func vanishesUploading(s *scene, _ *proxytest.Echo) {
	s.vanishing(s.AtWork, message("Content-Length: 100", "", "half"), message("Content-Length: 100", "", ""),
		message("Transfer-Encoding: chunked", "", "4\r\nhalf\r\n"), message("Transfer-Encoding: chunked", "", "64\r\nhalf"))
}

func vanishesQueued(s *scene) {
	release := s.answersLater(onePlace)
	s.vanishing(s.Queued, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", hello, message("Content-Length: 100", "", "half"),
		message("Transfer-Encoding: chunked", "", chunks))
	release()
}

func vanishesWithoutMemory(s *scene) {
	u := s.Upstream(func(p *proxytest.Peer) { p.Request(); p.Hold() })
	s.Start(u.URL, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1\n")
	first := s.Say(message(fmt.Sprintf("Content-Length: %d", mib), "", strings.Repeat("x", mib)))
	u.Reached(1)
	// Its body is in the sockets' buffers, with the news of its departure behind it: one too large for them keeps the news back.
	s.vanishing(s.Queued, message("Content-Length: 49152", "", strings.Repeat("x", 48<<10)))
	first.Reset()
	s.Expect(left(1))
	s.AtWork(0)
	u.Got(1)
}

// vanishing has clients that have sent these leave, in each way, as soon as they are seen at a place; that is then free.
func (s *scene) vanishing(seen func(clients float64), texts ...string) {
	s.Helper()
	for _, text := range texts {
		for _, departure := range departures {
			c := s.Say(text)
			seen(1)
			departure.leave(c)
			seen(0)
			s.Expect(left(0))
		}
	}
}

// left is the line of a client that has gone.
func left(attempts int) proxytest.Completed {
	return proxytest.Completed{Status: 499, Attempts: attempts, Err: "the client left"}
}

// departures are the ways in which a client can vanish that look different to the proxy.
var departures = []struct {
	name  string
	leave func(c *proxytest.RawClient)
}{
	{"FIN", (*proxytest.RawClient).Finish},
	{"RST", (*proxytest.RawClient).Reset},
}

// vanishes shows that the upstream is rid of a request that it has begun to answer,
// when its client leaves after it has seen the beginning.
func (s *scene) vanishes(begin func(p *proxytest.Peer), see func(c *proxytest.RawClient)) {
	s.Helper()
	cancelled := make(chan bool)
	u := s.Upstream(func(p *proxytest.Peer) {
		begin(p)
		p.Hold()
		cancelled <- true
	})
	s.Start(u.URL, "") // with time enough: only the departure ends the request
	for i, departure := range departures {
		c := s.Say(hello)
		u.Reached(int32(i + 1))
		see(c)
		departure.leave(c)
		select {
		case <-cancelled:
		case <-time.After(proxytest.Timeout):
			s.Fatalf("the client has left with a %s; the upstream's request goes on", departure.name)
		}
		s.Expect(left(1))
	}
	u.Got(len(departures))
}

func vanishesBetweenAttempts(s *scene) {
	u := s.Upstream(func(p *proxytest.Peer) {
		p.Request()
		p.Hold()
	})
	s.Start(u.URL, "[proxy]\ntimeout_secs = 1\n")
	for _, departure := range departures {
		attempts := 0
		for try := 0; attempts != 1 && try < 5; try++ { // a machine that is slow may miss the 100 ms between attempts
			before := u.Requests.Load()
			c := s.Say(hello)
			u.Reached(before + 1)
			proxytest.Eventually(s.T, "the end of an attempt", func() bool { return u.Connected() == 0 })
			departure.leave(c)
			s.Expect(left(-1))
			attempts = int(s.Completed()[len(s.Expects)-1].Number("attempts"))
			if got := u.Requests.Load() - before; int(got) > attempts {
				s.Errorf("the upstream got %d requests in %d attempts", got, attempts)
			}
		}
		if attempts != 1 {
			s.Errorf("the client has left with a %s before the second attempt; it was made", departure.name)
		}
	}
}

func pipelines(s *scene, _ *proxytest.Echo) {
	const many = 100
	var all strings.Builder
	for i := range many {
		fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET /%d HTTP/1.1\r\nHost: x\r\n\r\n", i, i)
	}
	c := s.Say(all.String())
	for i := range many {
		s.Passed(c.Answer(), 200, fmt.Sprintf("POST /%d {}", i), 1)
		s.Passed(c.Answer(), 200, fmt.Sprintf("GET /%d ", i), 1)
	}
}

func manyHeaders(s *scene) {
	const clients, headers = 100, 100_000
	var request strings.Builder
	request.WriteString("GET / HTTP/1.1\r\nHost: x\r\n")
	for i := range headers {
		fmt.Fprintf(&request, "%d:\r\n", i)
	}
	request.WriteString("\r\n")
	e := s.Echo()
	s.contained(e.URL, "")
	var all []*proxytest.RawClient
	for range clients {
		all = append(all, s.Say(request.String()))
	}
	for _, c := range all {
		c.TurnedAway(431)
	}
	s.peaked()
	e.Got(0)
}

func expectations(s *scene, e *proxytest.Echo) {
	c := s.Say(message("Expect: 100-continue", "Content-Length: 2", "", ""))
	if a := c.Answer(); a.StatusCode != 100 {
		s.Errorf("the client got status %d, want 100", a.StatusCode)
	}
	c.Say("{}")
	s.Passed(c.Answer(), 200, "POST /v1/messages {}", 1)
	if got := e.Only().Header["Expect"]; got != nil {
		s.Errorf("the upstream got Expect: %q, want none", got)
	}

	c = s.Say(message("Expect: 100-continue", fmt.Sprintf("Content-Length: %d", 11*mib), "", ""))
	s.Refused(c.Answer(), 400, "invalid_request", 0, "larger than 10 MiB")
	c.Closed()
	s.Say(message("Expect: 200-ok", "Content-Length: 2", "", "{}")).TurnedAway(417)
}
