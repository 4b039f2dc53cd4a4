package e2e

import (
	"net"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// signalled sends a signal and returns how long the proxy then lived. It checks
// for exit code 0.
func signalled(t *testing.T, p *proxytest.Proxy, sig syscall.Signal) time.Duration {
	t.Helper()
	start := time.Now()
	if err := p.Signal(sig); err != nil {
		t.Fatal(err)
	}
	code, err := p.Wait(proxytest.Timeout)
	if err != nil {
		t.Fatal(err)
	}
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	took := time.Since(start)
	t.Logf("%v to exit: %v", sig, took.Round(time.Millisecond))
	return took
}

// checkLastMessages checks how the log ends.
func checkLastMessages(t *testing.T, p *proxytest.Proxy, want ...string) {
	t.Helper()
	var all []string
	for _, line := range p.Logs() {
		if line.Message() != proxytest.MsgRequestCompleted {
			all = append(all, line.Message())
		}
	}
	if got := all[max(0, len(all)-len(want)):]; !slices.Equal(got, want) {
		t.Errorf("the log ends with %q, want %q", got, want)
	}
}

func TestShutdownIdle(t *testing.T) {
	t.Parallel()
	for sig, message := range map[syscall.Signal]string{
		syscall.SIGTERM: proxytest.MsgSIGTERM,
		syscall.SIGINT:  "received SIGINT, shutting down",
	} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, nil)
			p := proxyTo(t, up, "proxy.drain_timeout_secs = 60")
			c := client(t) // keeps its connection open
			roundTrip(t, c, newRequest(t, "GET", p.URL()+"/v1/models", nil))
			if took := signalled(t, p, sig); took > slack {
				t.Errorf("an idle proxy took %v to exit", took)
			}
			checkLastMessages(t, p, message, proxytest.MsgDrained, proxytest.MsgShutdownComplete)
		})
	}
}

// TestShutdownDrains shows that a stream in flight is finished, and that nothing
// new is let in meanwhile.
func TestShutdownDrains(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.API{Deltas: 20, Interval: 80 * time.Millisecond}) // about 2 s
		p := proxyTo(t, up, "proxy.drain_timeout_secs = 60")
		stream := inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody)))
		proxytest.Eventually(t, "the request at the upstream", func() bool { return len(up.Requests()) == 1 })

		start := time.Now()
		if err := p.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		closed := proxytest.Eventually(t, "no more connections accepted", func() bool {
			conn, err := net.Dial("tcp", p.Addr())
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
		res := <-stream
		if res.err != nil || !strings.HasSuffix(res.body, "message_stop\"}\n\n") {
			t.Errorf("the stream was not finished: %v, %.100q", res.err, res.body)
		}
		code, err := p.Wait(proxytest.Timeout)
		if err != nil || code != 0 {
			t.Errorf("exit code %d, %v; want 0", code, err)
		}
		took := time.Since(start)
		t.Logf("no connections after %v, exit after %v", closed.Round(time.Millisecond), took.Round(time.Millisecond))
		if took < time.Second || took > 2*time.Second+slack {
			t.Errorf("the exit came after %v, want the about 2s that the stream took", took)
		}
		if closed > took/2 {
			t.Errorf("connections were accepted for %v of the drain's %v", closed, took)
		}
		checkLastMessages(t, p, proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete)
		completed(t, p, 1)
	})
}

// TestShutdownForced shows that an endless stream is cut after the drain time,
// visibly.
func TestShutdownForced(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		config string
		drain  time.Duration
	}{
		{name: "default", drain: 5 * time.Second},
		{name: "configured", config: "proxy.drain_timeout_secs = 1", drain: time.Second},
		{name: "none", config: "proxy.drain_timeout_secs = 0", drain: 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.API{Deltas: 1e6, Interval: 20 * time.Millisecond})
			p := proxyTo(t, up, tt.config)
			var streams []*visitor
			for range 3 {
				streams = append(streams, visit(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody))))
			}
			for _, stream := range streams {
				<-stream.answered
			}

			checkDuration(t, "the forced exit", signalled(t, p, syscall.SIGTERM), tt.drain)
			for _, stream := range streams {
				if <-stream.done; stream.err == nil {
					t.Error("a cut stream looks complete")
				}
			}
			checkLastMessages(t, p, proxytest.MsgSIGTERM, proxytest.MsgDrainTimeout, proxytest.MsgShutdownComplete)
			line := proxytest.WaitLog(t, p, proxytest.MsgDrainTimeout)
			if line.Number("remaining") != 3 || line.Number("drain_timeout_secs") != tt.drain.Seconds() {
				t.Errorf("log line %s: want remaining 3 and drain_timeout_secs %v", line.Raw, tt.drain.Seconds())
			}
		})
	}
}

// TestSecondSignal shows that a second signal ends the drain at once.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
	p := proxyTo(t, up, "proxy.drain_timeout_secs = 60")
	waiting := inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(messageBody)))
	waitMetric(t, p, 1, "proxy_requests_in_flight")
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	proxytest.WaitLog(t, p, proxytest.MsgSIGTERM)
	if took := signalled(t, p, syscall.SIGTERM); took > slack {
		t.Errorf("the second signal took %v", took)
	}
	if res := <-waiting; res.err == nil && res.StatusCode == 200 {
		t.Errorf("the request in flight got a 200 from nowhere")
	}
}

// TestShutdownQueue shows that requests that have not started are told to go
// elsewhere at the signal, not after the drain.
func TestShutdownQueue(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.API{Deltas: 20, Interval: 80 * time.Millisecond})
	p := proxyTo(t, up, "[proxy]\nmax_connections = 1\ndrain_timeout_secs = 60")
	first := inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody)))
	waitMetric(t, p, 1, "proxy_requests_in_flight")
	var queued []<-chan result
	for range 3 {
		queued = append(queued, inBackground(t, newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody))))
	}
	waitMetric(t, p, 3, "proxy_requests_queued")

	start := time.Now()
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	for _, done := range queued {
		res := <-done
		if res.err != nil {
			t.Fatal(res.err)
		}
		if res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("X-Should-Retry") != "true" || !res.Close {
			t.Errorf("queued request: %d %v, close %v; want 503, x-should-retry: true, connection: close", res.StatusCode, res.Header, res.Close)
		}
		checkProxyError(t, res.answer, http.StatusServiceUnavailable, "")
	}
	answered := time.Since(start)
	t.Logf("the queue was answered %v after the signal", answered.Round(time.Millisecond))
	res := <-first
	if res.err != nil || !strings.HasSuffix(res.body, "message_stop\"}\n\n") {
		t.Errorf("the request in flight was not finished: %v, %.100q", res.err, res.body)
	}
	if drained := time.Since(start); answered > drained/2 {
		t.Errorf("the queue was answered after %v of %v", answered, drained)
	}
	if code, err := p.Wait(proxytest.Timeout); err != nil || code != 0 {
		t.Errorf("exit code %d, %v; want 0", code, err)
	}
	if n := len(up.Requests()); n != 1 {
		t.Errorf("the upstream got %d requests, want the first only", n)
	}
	checkLastMessages(t, p, proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete)
}

// TestKeepAliveDuringDrain shows that a request on a connection that was open
// before the signal is refused with a reason, or the connection is closed; it is
// never left without an answer.
func TestKeepAliveDuringDrain(t *testing.T) {
	t.Parallel()
	hold := make(gate)
	up := upstream(t, fakeanthropic.HTTP2, hold)
	p := proxyTo(t, up, "[proxy]\ndrain_timeout_secs = 60\nmax_connections = 1\n")
	inFlight := inBackground(t, newRequest(t, "GET", p.URL()+"/held", nil))
	waitMetric(t, p, 1, "proxy_requests_in_flight")
	queued := inBackground(t, newRequest(t, "GET", p.URL()+"/queued", nil))
	waitMetric(t, p, 1, "proxy_requests_queued")
	c := dial(t, p)
	c.send(t, "GET /livez HTTP/1.1", "Host: proxy", "", "")
	c.answer(t, "GET")
	// Half a request: this connection is not idle when the signal comes.
	c.send(t, "GET /v1/models HTTP/1.1", "Host: pro")
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-queued // is sent away as the drain begins
	c.Write([]byte("xy\r\n\r\n"))
	if resp, err := http.ReadResponse(c.r, nil); err == nil {
		if resp.StatusCode != 503 || !resp.Close || resp.Header.Get("X-Should-Retry") != "true" {
			t.Errorf("answer %d %v during the drain, want 503, connection: close", resp.StatusCode, resp.Header)
		}
	}
	hold.let(t)
	if res := <-inFlight; res.err != nil || res.StatusCode != 200 {
		t.Errorf("the request in flight: %v, %v", res.Response, res.err)
	}
	if code, err := p.Wait(proxytest.Timeout); err != nil || code != 0 {
		t.Errorf("exit code %d, %v; want 0", code, err)
	}
}
