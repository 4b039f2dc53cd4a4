package e2e

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// promised are the families that a scrape has from the start, by type. (The
// expiry of the node's key is there only with a key.)
var promised = map[string]dto.MetricType{
	"proxy_upstream_errors_total":   dto.MetricType_COUNTER,
	"tailnet_connected":             dto.MetricType_GAUGE,
	"proxy_requests_in_flight":      dto.MetricType_GAUGE,
	"proxy_requests_queued":         dto.MetricType_GAUGE,
	"proxy_upstream_retries_total":  dto.MetricType_COUNTER,
	"proxy_buffered_body_bytes":     dto.MetricType_GAUGE,
	"tailnet_control_online":        dto.MetricType_GAUGE,
	"proxy_build_info":              dto.MetricType_GAUGE,
	"process_cpu_seconds_total":     dto.MetricType_COUNTER,
	"process_resident_memory_bytes": dto.MetricType_GAUGE,
	"process_open_fds":              dto.MetricType_GAUGE,
	"process_start_time_seconds":    dto.MetricType_GAUGE,
	"go_goroutines":                 dto.MetricType_GAUGE,
	"go_info":                       dto.MetricType_GAUGE,
}

// afterRequests are those that need a request for a series.
var afterRequests = map[string]dto.MetricType{
	"proxy_requests_total":                     dto.MetricType_COUNTER,
	"proxy_request_duration_seconds":           dto.MetricType_HISTOGRAM,
	"proxy_time_to_first_byte_seconds":         dto.MetricType_HISTOGRAM,
	"proxy_request_duration_quantiles_seconds": dto.MetricType_SUMMARY,
}

func checkFamilies(t *testing.T, m proxytest.Metrics, want map[string]dto.MetricType) {
	t.Helper()
	for name, kind := range want {
		if m[name] == nil {
			t.Errorf("%s is missing", name)
		} else if got := m[name].GetType(); got != kind {
			t.Errorf("%s is a %v, want %v", name, got, kind)
		}
	}
}

func TestMetricsFromTheStart(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "")
	m := proxytest.Scrape(t, p)
	checkFamilies(t, m, promised)
	for _, kind := range []string{"timeout", "connection", "invalid_request", "response_read", "internal"} {
		if !m.Has("proxy_upstream_errors_total", "error_type", kind) {
			t.Errorf("error_type %q is not there from the start", kind)
		}
	}
	if n := len(m["proxy_upstream_errors_total"].GetMetric()); n != 5 {
		t.Errorf("%d error types, want 5", n)
	}
	if v := m.Value("proxy_upstream_errors_total"); v != 0 {
		t.Errorf("%v errors at the start", v)
	}
	start := m.Value("process_start_time_seconds")
	if got := time.Unix(0, int64(start*1e9)); got.Sub(p.Started).Abs() > 2*time.Second {
		t.Errorf("process_start_time_seconds is %v, want %v", got, p.Started)
	}
	rss, err := p.RSS()
	if err != nil {
		t.Fatal(err)
	}
	if got := m.Value("process_resident_memory_bytes"); got < float64(rss)/2 || got > float64(rss)*2 {
		t.Errorf("process_resident_memory_bytes is %v, the kernel says %v", got, rss)
	}
}

// TestMetricsValues checks the numbers of one request that took a known time.
func TestMetricsValues(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Slow(200*time.Millisecond, fakeanthropic.API{Deltas: 5, Interval: 50 * time.Millisecond}))
	p := proxyTo(t, up, "")
	post(t, p, streamBody)
	completed(t, p, 1)
	m := proxytest.Scrape(t, p)
	checkFamilies(t, m, afterRequests)
	if v := m.Value("proxy_requests_total", "status", "200", "method", "POST"); v != 1 {
		t.Errorf("proxy_requests_total is %v, want 1", v)
	}
	duration := m["proxy_request_duration_seconds"].GetMetric()[0].GetHistogram()
	first := m["proxy_time_to_first_byte_seconds"].GetMetric()[0].GetHistogram()
	t.Logf("duration %.3f s, time to first byte %.3f s", duration.GetSampleSum(), first.GetSampleSum())
	if s := duration.GetSampleSum(); s < 0.5 || s > 0.5+slack.Seconds() {
		t.Errorf("duration %v s, want about 0.7", s)
	}
	if s := first.GetSampleSum(); s < 0.2 || s > duration.GetSampleSum()-0.1 {
		t.Errorf("time to first byte %v s, want about 0.2", s)
	}
	var bounds []float64
	for _, b := range duration.GetBucket() {
		bounds = append(bounds, b.GetUpperBound())
	}
	if !slices.IsSorted(bounds) || bounds[0] != 0.005 || bounds[len(bounds)-2] != 600 || !math.IsInf(bounds[len(bounds)-1], 1) {
		t.Errorf("buckets %v, want 5 ms to 600 s and +Inf", bounds)
	}
	var quantiles []float64
	for _, q := range m["proxy_request_duration_quantiles_seconds"].GetMetric()[0].GetSummary().GetQuantile() {
		quantiles = append(quantiles, q.GetQuantile())
		if v := q.GetValue(); v < 0.25 || v > 0.5+2*slack.Seconds() {
			t.Errorf("quantile %v is %v s, want about 0.7", q.GetQuantile(), v)
		}
	}
	if !slices.Equal(quantiles, []float64{0.5, 0.9, 0.99, 0.999}) {
		t.Errorf("quantiles %v", quantiles)
	}
}

// TestMetricsUnderLoad scrapes a thousand times while requests of all kinds come
// and go: each scrape must be sound in itself, and never behind the one before.
func TestMetricsUnderLoad(t *testing.T) {
	t.Parallel()
	const scrapes, workers = 1000, 4
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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
	p := proxyTo(t, up, "[proxy]\nmax_connections = 3\nmax_body_mb = 1\nbody_memory_mb = 1")

	stop, load := make(chan struct{}), sync.WaitGroup{}
	for worker := range workers {
		c := client(t)
		load.Go(func() {
			kinds := []struct{ method, path, body string }{
				{"GET", "/ok", ""}, {"POST", "/ok", messageBody}, {"GET", "/429", ""}, {"GET", "/cut", ""}, {"FROB", "/ok", ""},
			}
			for i := worker; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				kind := kinds[i%len(kinds)]
				req, err := http.NewRequest(kind.method, p.URL()+kind.path, strings.NewReader(kind.body))
				if err != nil {
					t.Error(err)
					return
				}
				do(c, req) // some fail, as they should
			}
		})
	}
	defer load.Wait()
	defer close(stop)

	var before proxytest.Metrics
	for i := range scrapes {
		m := proxytest.Scrape(t, p) // expfmt parses it
		for _, problem := range append(unsound(m), backwards(before, m)...) {
			t.Errorf("scrape %d: %s", i, problem)
		}
		if t.Failed() {
			return
		}
		before = m
	}
	t.Logf("%v requests during %d scrapes", before.Value("proxy_requests_total"), scrapes)
	for _, status := range []string{"200", "429"} {
		if before.Value("proxy_requests_total", "status", status) == 0 {
			t.Errorf("no request with status %s: the load is not what it should be", status)
		}
	}
	if before.Value("proxy_upstream_errors_total", "error_type", "response_read") == 0 {
		t.Error("no broken answer: the load is not what it should be")
	}
	checkFamilies(t, before, promised)
	checkFamilies(t, before, afterRequests)
	lint(t, p)
}

// lint checks what promtool's "check metrics" checks.
func lint(t *testing.T, p *proxytest.Proxy) {
	t.Helper()
	a := roundTrip(t, client(t), newRequest(t, "GET", p.URL()+"/metrics", nil))
	problems, err := promlint.New(bytes.NewReader([]byte(a.body))).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("promlint: %s: %s", problem.Metric, problem.Text)
	}
}

// unsound lists what one scrape has wrong in itself.
func unsound(m proxytest.Metrics) []string {
	var problems []string
	for name, family := range m {
		for _, metric := range family.GetMetric() {
			h := metric.GetHistogram()
			if h == nil {
				continue
			}
			var last uint64
			for _, b := range h.GetBucket() {
				if b.GetCumulativeCount() < last {
					problems = append(problems, fmt.Sprintf("%s: bucket %v holds less than the one below", name, b.GetUpperBound()))
				}
				last = b.GetCumulativeCount()
			}
			if top := h.GetBucket()[len(h.GetBucket())-1]; !math.IsInf(top.GetUpperBound(), 1) || last != h.GetSampleCount() {
				problems = append(problems, fmt.Sprintf("%s: +Inf bucket %d, count %d", name, last, h.GetSampleCount()))
			}
		}
	}
	return problems
}

// backwards lists the counters, histogram counts and sums that went back.
func backwards(before, now proxytest.Metrics) []string {
	var problems []string
	for name, family := range before {
		if family.GetType() == dto.MetricType_GAUGE {
			continue
		}
		values := cumulative(now[name])
		for key, old := range cumulative(family) {
			if value, ok := values[key]; !ok || value < old {
				problems = append(problems, fmt.Sprintf("%s%s went from %v to %v", name, key, old, value))
			}
		}
	}
	return problems
}

// cumulative returns all of a family's values that may only grow, by series.
func cumulative(family *dto.MetricFamily) map[string]float64 {
	values := map[string]float64{}
	for _, metric := range family.GetMetric() {
		key := fmt.Sprint(metric.GetLabel())
		values[key] = metric.GetCounter().GetValue()
		if h := metric.GetHistogram(); h != nil {
			values[key+" count"], values[key+" sum"] = float64(h.GetSampleCount()), h.GetSampleSum()
			for _, b := range h.GetBucket() {
				values[fmt.Sprint(key, " le ", b.GetUpperBound())] = float64(b.GetCumulativeCount())
			}
		}
		if s := metric.GetSummary(); s != nil {
			values[key+" count"], values[key+" sum"] = float64(s.GetSampleCount()), s.GetSampleSum()
		}
	}
	return values
}
