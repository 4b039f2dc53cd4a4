package e2e

import (
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"strings"
	"sync"
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

// unsound lists what one scrape has wrong in itself: buckets that hold less than the one below, or not all.
func unsound(m proxytest.Metrics) (problems []string) {
	for name, family := range m {
		for _, metric := range family.GetMetric() {
			below := uint64(0)
			for _, b := range metric.GetHistogram().GetBucket() {
				if all := metric.GetHistogram().GetSampleCount(); b.GetCumulativeCount() < below || math.IsInf(b.GetUpperBound(), 1) && b.GetCumulativeCount() != all {
					problems = append(problems, fmt.Sprintf("%s: bucket %v holds %d, the one below %d, all %d", name, b.GetUpperBound(), b.GetCumulativeCount(), below, all))
				}
				below = b.GetCumulativeCount()
			}
		}
	}
	return problems
}

// cumulative returns all values that may only grow, by series.
func cumulative(t *testing.T, m proxytest.Metrics) map[string]float64 {
	all := map[string]float64{}
	for _, family := range m {
		if family.GetType() != dto.MetricType_GAUGE {
			maps.Copy(all, samples(t, family))
		}
	}
	maps.DeleteFunc(all, func(series string, _ float64) bool { return strings.Contains(series, "quantile=") })
	return all
}

// TestMetricsUnderLoad scrapes a thousand times while requests of all kinds come
// and go: each scrape must be sound in itself, and never behind the one before.
func TestMetricsUnderLoad(t *testing.T) {
	t.Parallel()
	const scrapes, workers = 1000, 4
	s := proxytest.NewScene(t)
	up := s.API(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		switch r.URL.Path {
		case "/cut":
			w.Header().Set("Content-Length", "10")
			fakeanthropic.Flush(w)
			panic(http.ErrAbortHandler)
		case "/429":
			w.WriteHeader(429)
		default:
			io.WriteString(w, "ok")
		}
	}))
	p := proxytest.Local(t, up.URL, "[proxy]\nmax_connections = 3\nmax_body_mb = 1\nbody_memory_mb = 1", up.Env()...)
	s.Proxy = p

	stop, load := make(chan struct{}), sync.WaitGroup{}
	for worker := range workers {
		load.Go(func() {
			kinds := []struct{ method, path, body string }{
				{"GET", "/ok", ""}, {"POST", "/ok", proxytest.Message}, {"GET", "/429", ""}, {"GET", "/cut", ""}, {"FROB", "/ok", ""},
			}
			for i := worker; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				kind := kinds[i%len(kinds)]
				s.Try(s.Request(kind.method, kind.path, strings.NewReader(kind.body))) // some fail, as they should
			}
		})
	}
	defer load.Wait()
	defer close(stop)

	var m proxytest.Metrics
	before := map[string]float64{}
	for i := range scrapes {
		m = proxytest.Scrape(t, p) // expfmt parses it
		if problems := unsound(m); problems != nil {
			t.Fatalf("scrape %d: %q", i, problems)
		}
		now := cumulative(t, m)
		for series, old := range before {
			if value, ok := now[series]; !ok || value < old {
				t.Fatalf("scrape %d: %s went from %v to %v", i, series, old, value)
			}
		}
		before = now
	}
	t.Logf("%v requests during %d scrapes", m.Value("proxy_requests_total"), scrapes)
	for _, status := range []string{"200", "429"} {
		if m.Value("proxy_requests_total", "status", status) == 0 {
			t.Errorf("no request with status %s: the load is not what it should be", status)
		}
	}
	if m.Value("proxy_upstream_errors_total", "error_type", "response_read") == 0 {
		t.Error("no broken answer: the load is not what it should be")
	}
	if start := time.Unix(0, int64(m.Value("process_start_time_seconds")*1e9)); start.Sub(p.Started).Abs() > 2*time.Second {
		t.Errorf("process_start_time_seconds is %v, want %v", start, p.Started)
	}
	rss, err := p.RSS()
	if got := m.Value("process_resident_memory_bytes"); err != nil || got < float64(rss)/2 || got > float64(rss)*2 {
		t.Errorf("process_resident_memory_bytes is %v, the kernel says %v, %v", got, rss, err)
	}
	for kind, names := range promised {
		for _, name := range names {
			if m[name] == nil || m[name].GetType() != kind {
				t.Errorf("%s is missing, or a %v, want a %v", name, m[name].GetType(), kind)
			}
		}
	}
}
