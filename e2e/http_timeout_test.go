package e2e

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// slack is what a noisy machine may add to a duration.
const slack = 10 * time.Second

// checkDuration checks that something took at least want, and not much longer.
func checkDuration(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	t.Logf("%s: %v (nominal %v)", what, got.Round(time.Millisecond), want)
	if got < want-5*time.Millisecond || got > want+slack {
		t.Errorf("%s took %v, want %v", what, got, want)
	}
}

func TestNoHeadersInTime(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.Silent())
		p := proxyTo(t, up, "proxy.timeout_secs = 1")

		start := time.Now()
		a := post(t, p, messageBody)
		checkDuration(t, "three attempts", time.Since(start), 3*time.Second+200*time.Millisecond)
		checkProxyError(t, a, http.StatusGatewayTimeout, "timeout")
		if got := a.Header.Get("X-Should-Retry"); got != "false" {
			t.Errorf("x-should-retry %q, want false: the SDKs would multiply the attempts", got)
		}

		attempts := up.Requests()
		if len(attempts) != 3 {
			t.Fatalf("%d attempts, want 3", len(attempts))
		}
		for i, r := range attempts {
			if string(r.Body) != messageBody || r.Header.Get("Authorization") != "Bearer test-token" {
				t.Errorf("attempt %d: body %q, headers %v: not what the client sent", i+1, r.Body, r.Header)
			}
			if i > 0 {
				// Seen from the upstream, whose view of the earlier one may be late.
				gap := r.Started.Sub(attempts[i-1].Started)
				t.Logf("start to start: %v (nominal 1.1s)", gap.Round(time.Millisecond))
				if gap < 500*time.Millisecond || gap > 1100*time.Millisecond+slack {
					t.Errorf("%v from start to start, want 1.1s", gap)
				}
			}
		}

		line := completed(t, p, 1)[0]
		if line.Number("attempts") != 3 || line.Number("status") != 504 || line.Text("error") == "" {
			t.Errorf("log line %s: want 3 attempts, status 504 and an error", line.Raw)
		}
		checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "timeout")
		checkMetric(t, p, 1, "proxy_upstream_errors_total")
		checkMetric(t, p, 2, "proxy_upstream_retries_total")
		checkMetric(t, p, 1, "proxy_requests_total", "status", "504", "method", "POST")
	})
}

func TestTimeoutThenAnswer(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
	p := proxyTo(t, up, "proxy.timeout_secs = 1")
	go func() {
		for len(up.Requests()) == 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		up.Handle(nil) // the second attempt gets an answer
	}()
	if a := post(t, p, messageBody); a.StatusCode != 200 || !strings.Contains(a.body, "end_turn") {
		t.Errorf("answer %d %q, want the second attempt's", a.StatusCode, a.body)
	}
	if n := completed(t, p, 1)[0].Number("attempts"); n != 2 {
		t.Errorf("attempts %v, want 2", n)
	}
	checkMetric(t, p, 0, "proxy_upstream_errors_total")
	checkMetric(t, p, 1, "proxy_upstream_retries_total")
}

// TestClientPatience shows how long an attempt waits for headers, and how often,
// when the client says how long it waits itself.
func TestClientPatience(t *testing.T) {
	t.Parallel()
	const patient, contract = 1, 3 // attempts
	tests := []struct {
		name     string
		config   string
		header   string
		delay    time.Duration // of the upstream's headers
		status   int
		attempts int
	}{
		{name: "answer within the client's time", header: "30", delay: 2500 * time.Millisecond, status: 200, attempts: patient},
		{name: "no answer in the client's time", header: "3", delay: time.Minute, status: 504, attempts: patient},
		{name: "above an hour counts as an hour", header: "999999", delay: 2500 * time.Millisecond, status: 200, attempts: patient},
		{name: "beyond every integer", header: "99999999999999999999", delay: 2500 * time.Millisecond, status: 200, attempts: patient},
		{name: "switched off", config: "honor_client_timeout = false", header: "30", delay: time.Minute, status: 504, attempts: contract},
		{name: "absent", delay: time.Minute, status: 504, attempts: contract},
		{name: "not above timeout_secs", header: "1", delay: time.Minute, status: 504, attempts: contract},
		{name: "no number", header: "soon", delay: time.Minute, status: 504, attempts: contract},
		{name: "a fraction", header: "3.0", delay: time.Minute, status: 504, attempts: patient},
		{name: "negative", header: "-30", delay: time.Minute, status: 504, attempts: contract},
		{name: "empty", header: "", delay: time.Minute, status: 504, attempts: contract},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Slow(tt.delay, fakeanthropic.API{}))
			p := proxyTo(t, up, "[proxy]\ntimeout_secs = 1\n"+tt.config)
			var headers []string
			if tt.name != "absent" {
				headers = []string{"X-Stainless-Timeout", tt.header}
			}
			start := time.Now()
			a := post(t, p, messageBody, headers...)
			t.Logf("status %d after %v", a.StatusCode, time.Since(start).Round(time.Millisecond))
			if a.StatusCode != tt.status {
				t.Errorf("status %d, want %d", a.StatusCode, tt.status)
			}
			if n := len(up.Requests()); n != tt.attempts {
				t.Errorf("%d attempts, want %d", n, tt.attempts)
			}
			if tt.status == 504 && tt.attempts == patient {
				checkDuration(t, "the client's time", time.Since(start), 3*time.Second)
			}
			if got := up.Requests()[0].Header.Get("X-Stainless-Timeout"); got != tt.header {
				t.Errorf("the upstream got x-stainless-timeout %q, want %q", got, tt.header)
			}
		})
	}
}

// TestLongStream shows that no clock but that of silence runs on a stream: an
// event every half timeout for five timeouts.
func TestLongStream(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.API{Deltas: 6, Interval: time.Second})
		p := proxyTo(t, up, "proxy.timeout_secs = 2")
		start := time.Now()
		a := post(t, p, streamBody)
		t.Logf("the stream took %v", time.Since(start).Round(time.Millisecond))
		if took := time.Since(start); took < 10*time.Second {
			t.Errorf("the stream took %v: not long enough to show anything", took)
		}
		if !strings.HasSuffix(a.body, "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n") {
			t.Errorf("the stream is not complete: %q", a.body)
		}
		completed(t, p, 1)
		checkMetric(t, p, 0, "proxy_upstream_errors_total")
	})
}

// TestSilentStream shows that a stream that falls silent is visibly broken, and
// that nothing is added to it.
func TestSilentStream(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.API{StallAt: 3})
		p := proxyTo(t, up, "proxy.timeout_secs = 1")
		start := time.Now()
		resp, err := client(t).Do(newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(streamBody)))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("the stream ended with %v, want a visible break (%v)", err, io.ErrUnexpectedEOF)
		}
		checkDuration(t, "silence", time.Since(start), time.Second)
		if !strings.Contains(lastEvent(string(body)), "word2 ") {
			t.Errorf("the stream does not end with the last event sent: %q", lastEvent(string(body)))
		}
		line := completed(t, p, 1)[0]
		if line.Number("status") != 200 || line.Text("error") == "" {
			t.Errorf("log line %s: want status 200 and an error", line.Raw)
		}
		checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "response_read")
		proxytest.Eventually(t, "upstream request cancelled", func() bool { return !only(t, up).Cancelled.IsZero() })
	})
}

// lastEvent returns the last event of a stream, "" if the stream ends within one.
func lastEvent(stream string) string {
	whole, ok := strings.CutSuffix(stream, "\n\n")
	if !ok {
		return ""
	}
	return whole[strings.LastIndex(whole, "\n\n")+1:]
}
