package e2e

import (
	"slices"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestShutdownIdle: every signal that asks for it ends the program at once, in the runbook's words. (What becomes of requests is
// TestShutDown's.)
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
			s.Completed()
			start := time.Now()
			proxytest.Check(t, s.Proxy.Signal(sig))
			s.Ended()
			if took := time.Since(start); took > 10*time.Second { // on the noisiest machine
				t.Errorf("an idle proxy took %v to exit", took)
			}
			var said []string
			for _, line := range s.Proxy.Logs() {
				said = append(said, line.Message())
			}
			if want := []string{message, proxytest.MsgDrained, proxytest.MsgShutdownComplete}; !slices.Equal(said[len(said)-3:], want) {
				t.Errorf("the log is %q, want the end %q", said, want)
			}
		})
	}
}
