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
			s := proxytest.NewScene(t)
			s.StartAPI(fakeanthropic.HTTP2, answerOK, "proxy.drain_timeout_secs = 60")
			s.Passed(s.Get("/v1/models"), 200, "ok", 1) // over a connection that stays open
			start := time.Now()
			proxytest.Check(t, s.Proxy.Signal(sig))
			s.Ended()
			if took := time.Since(start); took > slack {
				t.Errorf("an idle proxy took %v to exit", took)
			}
			checkLastMessages(t, s.Proxy, message, proxytest.MsgDrained, proxytest.MsgShutdownComplete)
		})
	}
}

// TestShutdownDrains shows that a stream in flight is finished, and that nothing new is let in meanwhile.
func TestShutdownDrains(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, fakeanthropic.API{Deltas: 20, Interval: 80 * time.Millisecond}, "proxy.drain_timeout_secs = 60") // about 2 s
		stream := s.InBackground(strings.NewReader(proxytest.Stream))
		proxytest.Eventually(s, "the request at the upstream", func() bool { return len(up.Requests()) == 1 })
		start := time.Now()
		s.Signal()
		closed := proxytest.Eventually(s, "no more connections accepted", func() bool {
			conn, err := net.Dial("tcp", s.Proxy.Addr())
			if err == nil {
				conn.Close()
			}
			return err != nil
		})
		a := <-stream
		s.Passed(a, 200, a.Text, 1)
		if !strings.HasSuffix(a.Text, "message_stop\"}\n\n") {
			s.Errorf("the stream was not finished: %.100q", a.Text)
		}
		s.Ended()
		took := time.Since(start)
		s.Logf("no connections after %v, exit after %v", closed.Round(time.Millisecond), took.Round(time.Millisecond))
		if took < time.Second || took > 2*time.Second+slack {
			s.Errorf("the exit came after %v, want the about 2s that the stream took", took)
		}
		if closed > took/2 {
			s.Errorf("connections were accepted for %v of the drain's %v", closed, took)
		}
		checkLastMessages(s.T, s.Proxy, proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete)
	})
}
