package main

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// samplesOf returns the samples of a metrics page by name and labels; each must be there once.
func samplesOf(t testing.TB, page []byte) map[string]float64 {
	t.Helper()
	samples := map[string]float64{}
	for line := range strings.Lines(string(page)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		_, twice := samples[line[:i]]
		holds(t, err == nil && !twice, "line %q: %v, twice: %t", line, err, twice)
		samples[line[:i]] = value
	}
	return samples
}

// expectSamples wants these samples to be there.
func expectSamples(t testing.TB, samples, want map[string]float64) {
	t.Helper()
	for name, value := range want {
		got, ok := samples[name]
		holds(t, ok && math.Abs(got-value) <= 1e-9, "%s is %v (there: %t), want %v", name, got, ok, value)
	}
}

// TestHistogramBounds: a bound is in its bucket, a nanosecond more is in the next.
func TestHistogramBounds(t *testing.T) {
	for i, bound := range durationBuckets[:len(durationBuckets)-1] {
		d := time.Duration(math.Round(bound * 1e9))
		var h histogram
		h.observe(d)
		h.observe(d + 1)
		equal(t, fmt.Sprintf("in the bucket up to %v s, and in the next", bound), []uint64{h.buckets[i].Load(), h.buckets[i+1].Load()}, []uint64{1, 1})
	}
}

func TestQuantile(t *testing.T) {
	repeat := func(n int, d time.Duration) []time.Duration { return slices.Repeat([]time.Duration{d}, n) }
	for name, row := range map[string]struct {
		times []time.Duration
		q     float64
		want  float64
	}{
		"nothing":                               {q: 0.5, want: math.NaN()},
		"half of a bucket from 1 to 2.5":        {times: repeat(10, 2*time.Second), q: 0.5, want: 1.75},
		"all of it":                             {times: repeat(10, 2*time.Second), q: 1, want: 2.5},
		"first bucket begins at 0":              {times: repeat(4, time.Millisecond), q: 0.5, want: 0.0025},
		"at a boundary, the lower bucket's end": {times: append(repeat(5, 3*time.Millisecond), repeat(5, 7*time.Second)...), q: 0.5, want: 0.005},
		"over a gap":                            {times: append(repeat(5, 3*time.Millisecond), repeat(5, 7*time.Second)...), q: 0.9, want: 5 + 5*0.8},
		"one of many":                           {times: append(repeat(999, 3*time.Millisecond), 100*time.Second), q: 0.9995, want: 90 + 30*0.5},
		"beyond the last bound":                 {times: repeat(3, time.Hour), q: 0.5, want: 600},
	} {
		var h histogram
		for _, d := range row.times {
			h.observe(d)
		}
		cumulative, _ := h.snapshot()
		got := quantile(row.q, cumulative[:])
		holds(t, math.Abs(got-row.want) <= 1e-9 || math.IsNaN(got) && math.IsNaN(row.want), "%s: got %v, want %v", name, got, row.want)
	}
}

// TestMetricsBeforeTraffic: what the runbook's alerts look at is there from the start.
func TestMetricsBeforeTraffic(t *testing.T) {
	samples := samplesOf(t, newMetrics("1.2.3", "abc\"d").page())
	want := map[string]float64{"proxy_upstream_retries_total": 0, `proxy_upstream_ratelimit_status_total{status="allowed_warning"}`: 0, "proxy_time_to_first_byte_seconds_count": 0,
		`proxy_build_info{version="1.2.3",revision="abc\"d",go_version="` + runtime.Version() + `"}`: 1, `go_info{version="` + runtime.Version() + `"}`: 1}
	for _, errorType := range errorTypes {
		want[`proxy_upstream_errors_total{error_type="`+string(errorType)+`"}`] = 0
	}
	expectSamples(t, samples, want)
	for _, name := range []string{"process_start_time_seconds", "process_cpu_seconds_total", "process_open_fds", "process_max_fds", "process_virtual_memory_bytes",
		"process_resident_memory_bytes", "go_goroutines", "go_sched_gomaxprocs_threads", "go_memstats_heap_alloc_bytes", "go_memstats_sys_bytes", "go_gc_gomemlimit_bytes"} {
		holds(t, samples[name] > 0, "%s: %v", name, samples[name])
	}
}

// TestOwnedMetrics: figures of others stand between what was counted and the build, in the order in which they
// were added, as they are at the time; what has no value is left out, its family too.
func TestOwnedMetrics(t *testing.T) {
	m := newMetrics("", "")
	value, ok := 1.5, true
	contains := func(want string) {
		page := string(m.page())
		holds(t, strings.Contains(page, want), "want\n%sin\n%s", want, page)
	}
	m.gauge("b", "Help of b.", func() (float64, bool) { return value, true })
	m.gauge("c", "Help of c.", func() (float64, bool) { return 7, ok })
	m.counter("a_total", "Help of a.", func() (float64, bool) { return 3, true })
	const before, a = "\nproxy_upstream_ratelimit_status_total{status=\"other\"} 0\n", "# HELP a_total Help of a.\n# TYPE a_total counter\na_total 3\n# HELP proxy_build_info "
	contains(before + "# HELP b Help of b.\n# TYPE b gauge\nb 1.5\n# HELP c Help of c.\n# TYPE c gauge\nc 7\n" + a)
	value, ok = 2, false
	contains(before + "# HELP b Help of b.\n# TYPE b gauge\nb 2\n" + a)
}

// TestMetricsPage checks the figures after some traffic. (FuzzMetrics in e2e holds the page's form against
// Prometheus' own parser.)
func TestMetricsPage(t *testing.T) {
	m := newMetrics("1.2.3", "abc")
	m.requestDone(200, "POST", 2*time.Second)
	m.requestDone(200, "POST", 2*time.Hour)
	m.requestDone(200, "GET", time.Millisecond)
	m.requestDone(499, "PROPFIND", 0)
	m.requestDone(999, "get", 0)
	m.requestDone(100, "", 0)
	m.firstByte(700 * time.Millisecond)
	m.upstreamError(typeInternal)
	m.upstreamError(typeTimeout)
	m.upstreamError(typeTimeout)
	m.retries.Add(3)
	expectSamples(t, samplesOf(t, m.page()), map[string]float64{
		`proxy_requests_total{status="200",method="POST"}`:                        2,
		`proxy_requests_total{status="200",method="GET"}`:                         1,
		`proxy_requests_total{status="499",method="other"}`:                       1,
		`proxy_requests_total{status="999",method="other"}`:                       1,
		`proxy_requests_total{status="100",method="other"}`:                       1,
		`proxy_request_duration_seconds_bucket{status="200",le="0.005"}`:          1,
		`proxy_request_duration_seconds_bucket{status="200",le="1"}`:              1,
		`proxy_request_duration_seconds_bucket{status="200",le="2.5"}`:            2,
		`proxy_request_duration_seconds_bucket{status="200",le="600"}`:            2,
		`proxy_request_duration_seconds_bucket{status="200",le="+Inf"}`:           3,
		`proxy_request_duration_seconds_sum{status="200"}`:                        7202.001,
		`proxy_request_duration_quantiles_seconds{status="200",quantile="0.5"}`:   1.75, // rank 1.5: in the middle of the bucket from 1 to 2.5
		`proxy_request_duration_quantiles_seconds{status="200",quantile="0.999"}`: 600,
		`proxy_request_duration_quantiles_seconds_count{status="200"}`:            3,
		`proxy_time_to_first_byte_seconds_bucket{le="0.5"}`:                       0,
		`proxy_time_to_first_byte_seconds_bucket{le="1"}`:                         1,
		`proxy_upstream_errors_total{error_type="timeout"}`:                       2,
		`proxy_upstream_errors_total{error_type="internal"}`:                      1,
		`proxy_upstream_retries_total`:                                            3,
	})
	equal(t, "requests in all", m.requestsTotal(), 6)
	equal(t, "errors in all", m.errorsTotal(), 3)
}

// TestMetricsConcurrently records and writes at once; the race detector looks on, nothing may be lost, each page is sound in itself and
// never behind the one before, and nobody who records waits for a page that is being written: that would never end here, as the page
// waits for one of them.
func TestMetricsConcurrently(t *testing.T) {
	m := newMetrics("", "")
	record := func(i int) {
		m.requestDone(200+i%20, methods[i%len(methods)], time.Duration(i)*time.Millisecond)
		m.upstreamError(errorTypes[i%len(errorTypes)])
		m.firstByte(time.Second)
		m.rateLimitStatus("allowed")
		m.retries.Add(1)
	}
	m.gauge("recording", "", func() (float64, bool) {
		together(1, record)
		return 1, true
	})
	const workers, each, pages = 8, 500, 5
	together(workers, func(worker int) {
		before := map[string]float64{}
		for i := range each {
			record(i + worker)
			if i%(each/pages) != 0 {
				continue
			}
			now := samplesOf(t, m.page())
			for series, value := range before {
				holds(t, !strings.HasPrefix(series, "proxy_") || strings.Contains(series, "quantile=") || now[series] >= value, "%s went from %v to %v", series, value, now[series])
			}
			const firstByte = "proxy_time_to_first_byte_seconds_"
			for _, le := range []string{"1", "600", "+Inf"} {
				equal(t, "those up to "+le, now[firstByte+`bucket{le="`+le+`"}`], now[firstByte+"count"])
			}
			before = now
		}
	})
	const all = workers * (each + pages)
	expectSamples(t, samplesOf(t, m.page()), map[string]float64{"proxy_time_to_first_byte_seconds_count": all, "proxy_upstream_retries_total": all,
		`proxy_upstream_ratelimit_status_total{status="allowed"}`: all})
	equal(t, "requests, and one more for the last page", m.requestsTotal(), all+1)
	equal(t, "errors", m.errorsTotal(), all+1)
}
