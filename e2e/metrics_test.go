package e2e

import (
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// promised are the families that a scrape has once there were requests. (The tailnet's are there only with a tailnet: e2e/tailnet looks
// at them.)
var promised = map[dto.MetricType][]string{
	dto.MetricType_COUNTER: {
		"proxy_requests_total", "proxy_upstream_errors_total", "proxy_upstream_retries_total", "proxy_upstream_ratelimit_status_total",
		"proxy_log_lines_dropped_total", "process_cpu_seconds_total",
	},
	dto.MetricType_GAUGE: {
		"proxy_connections", "proxy_connections_limit", "proxy_requests_in_flight", "proxy_requests_queued", "proxy_buffered_body_bytes",
		"proxy_build_info", "process_resident_memory_bytes", "process_open_fds", "process_start_time_seconds", "go_goroutines", "go_info",
	},
	dto.MetricType_HISTOGRAM: {"proxy_request_duration_seconds", "proxy_time_to_first_byte_seconds"},
	dto.MetricType_SUMMARY:   {"proxy_request_duration_quantiles_seconds"},
}

// TestMetricsServed: what a scrape has, and that the process's own figures are the kernel's.
func TestMetricsServed(t *testing.T) {
	t.Parallel()
	s := proxytest.NewScene(t)
	s.StartAPI(fakeanthropic.HTTP2, answerOK, "")
	s.Passed(s.Post(), 200, "ok", 1)
	s.Completed()
	m := proxytest.Scrape(t, s.Proxy) // expfmt parses it
	for kind, names := range promised {
		for _, name := range names {
			if m[name] == nil || m[name].GetType() != kind {
				t.Errorf("%s is missing, or a %v, want a %v", name, m[name].GetType(), kind)
			}
		}
	}
	if start := time.Unix(0, int64(m.Value("process_start_time_seconds")*1e9)); start.Sub(s.Proxy.Started).Abs() > 2*time.Second {
		t.Errorf("process_start_time_seconds is %v, want %v", start, s.Proxy.Started)
	}
	rss, err := s.Proxy.RSS()
	if got := m.Value("process_resident_memory_bytes"); err != nil || got < float64(rss)/2 || got > float64(rss)*2 {
		t.Errorf("process_resident_memory_bytes is %v, the kernel says %v, %v", got, rss, err)
	}
}
