package e2e

import (
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// slack is what a noisy machine may add to a duration.
const slack = 10 * time.Second

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
		syscall.SIGHUP:  "received SIGHUP, shutting down",
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
