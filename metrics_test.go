package main

import (
	"fmt"
	"log/slog"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// localProxy returns a proxy without a tailnet, in front of nothing.
func localProxy(t testing.TB) *proxy {
	t.Helper()
	cfg := testConfig(t, "", overrides{local: true, upstream: "http://127.0.0.1:1"})
	return newLife(cfg, nil, slog.New(slog.DiscardHandler), new(lineWriter)).proxy
}

// scrape returns the samples of the metrics page, by name and labels, and its text.
func scrape(t testing.TB, m *metrics) (samples map[string]float64, text string) {
	t.Helper()
	body := m.page()
	samples = map[string]float64{}
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[i+1:], 64)
		if _, twice := samples[line[:i]]; err != nil || twice {
			t.Errorf("line %q: %v, twice: %t", line, err, twice)
		}
		samples[line[:i]] = value
	}
	return samples, string(body)
}

func TestEncoder(t *testing.T) {
	for _, row := range []struct {
		name  string
		write func(e *encoder)
		want  string
	}{
		{name: "no labels", write: func(e *encoder) { e.single("a", "gauge", "Help.", 1.5) }, want: "# HELP a Help.\n# TYPE a gauge\na 1.5\n"},
		{name: "labels", write: func(e *encoder) { e.name = "a"; e.sample("_sum", 2, "x", "1", "y", "") }, want: "a_sum{x=\"1\",y=\"\"} 2\n"},
		{name: "escapes in help", write: func(e *encoder) { e.family("a", "counter", "\"q\" \\ \n.") }, want: "# HELP a \"q\" \\\\ \\n.\n# TYPE a counter\n"},
		{name: "escapes in labels", write: func(e *encoder) { e.name = "a"; e.sample("", 0, "x", "\"q\" \\ \n é") }, want: "a{x=\"\\\"q\\\" \\\\ \\n é\"} 0\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var e encoder
			row.write(&e)
			if e.String() != row.want {
				t.Errorf("got\n%swant\n%s", e.String(), row.want)
			}
		})
	}
	for f, want := range map[float64]string{math.Inf(1): "+Inf", math.Inf(-1): "-Inf", 0: "0", 0.005: "0.005", 600: "600", 1e21: "1e+21", 123456789: "1.23456789e+08"} {
		if got := formatFloat(f); got != want {
			t.Errorf("formatFloat(%v) = %s, want %s", f, got, want)
		}
	}
	if got := formatFloat(math.NaN()); got != "NaN" {
		t.Errorf("not a number is %s", got)
	}
}

// TestHistogramBounds: a bound is in its bucket, a nanosecond more is in the next.
func TestHistogramBounds(t *testing.T) {
	if first, last := durationBuckets[0], durationBuckets[len(durationBuckets)-1]; first != 0.005 || last != 600 || !slices.IsSorted(durationBuckets[:]) {
		t.Errorf("buckets %v, want ascending ones from 0.005 to 600", durationBuckets)
	}
	for i, bound := range durationBuckets {
		d := time.Duration(math.Round(bound * 1e9))
		var h histogram
		h.observe(d)
		h.observe(d + 1)
		if h.buckets[i].Load() != 1 || h.buckets[i+1].Load() != 1 {
			cumulative, _ := h.snapshot()
			t.Errorf("at %v s: %v", bound, cumulative)
		}
	}
	var h histogram
	h.observe(0)
	h.observe(-1)
	if h.buckets[0].Load() != 2 {
		t.Error("nothing at all is not in the first bucket")
	}
}

func TestQuantile(t *testing.T) {
	repeat := func(n int, d time.Duration) []time.Duration { return slices.Repeat([]time.Duration{d}, n) }
	for _, row := range []struct {
		name  string
		times []time.Duration
		q     float64
		want  float64
	}{
		{name: "nothing", q: 0.5, want: math.NaN()},
		{name: "half of a bucket from 1 to 2.5", times: repeat(10, 2*time.Second), q: 0.5, want: 1.75},
		{name: "all of it", times: repeat(10, 2*time.Second), q: 1, want: 2.5},
		{name: "first bucket begins at 0", times: repeat(4, time.Millisecond), q: 0.5, want: 0.0025},
		{name: "at a boundary, the lower bucket's end", times: append(repeat(5, 3*time.Millisecond), repeat(5, 7*time.Second)...), q: 0.5, want: 0.005},
		{name: "over a gap", times: append(repeat(5, 3*time.Millisecond), repeat(5, 7*time.Second)...), q: 0.9, want: 5 + 5*0.8},
		{name: "one of many", times: append(repeat(999, 3*time.Millisecond), 100*time.Second), q: 0.9995, want: 90 + 30*0.5},
		{name: "beyond the last bound", times: repeat(3, time.Hour), q: 0.5, want: 600},
	} {
		t.Run(row.name, func(t *testing.T) {
			var h histogram
			for _, d := range row.times {
				h.observe(d)
			}
			cumulative, _ := h.snapshot()
			got := quantile(row.q, cumulative[:])
			if math.Abs(got-row.want) > 1e-9 || math.IsNaN(got) != math.IsNaN(row.want) {
				t.Errorf("got %v, want %v", got, row.want)
			}
		})
	}
}

// TestMetricsBeforeTraffic: what the runbook's alerts look at is there from the start.
func TestMetricsBeforeTraffic(t *testing.T) {
	samples, text := scrape(t, localProxy(t).metrics)
	for _, errorType := range []string{"timeout", "connection", "invalid_request", "response_read", "internal"} {
		if n, ok := samples[`proxy_upstream_errors_total{error_type="`+errorType+`"}`]; !ok || n != 0 {
			t.Errorf("%s: %v, %t", errorType, n, ok)
		}
	}
	for _, name := range []string{"tailnet_connected", "tailnet_control_online", "proxy_requests_in_flight", "proxy_requests_queued",
		"proxy_upstream_retries_total", "proxy_buffered_body_bytes", "proxy_time_to_first_byte_seconds_count"} {
		if n, ok := samples[name]; !ok || n != 0 {
			t.Errorf("%s: %v, %t", name, n, ok)
		}
	}
	for _, name := range []string{"process_start_time_seconds", "process_resident_memory_bytes", "process_open_fds", "process_max_fds", "go_goroutines", "go_memstats_heap_alloc_bytes"} {
		if samples[name] <= 0 {
			t.Errorf("%s: %v", name, samples[name])
		}
	}
	for _, family := range []string{"proxy_requests_total counter", "proxy_request_duration_seconds histogram", "proxy_request_duration_quantiles_seconds summary",
		"proxy_upstream_errors_total counter", "tailnet_connected gauge", "proxy_build_info gauge"} {
		if strings.Count(text, "# TYPE "+family+"\n") != 1 {
			t.Errorf("there is no family %s", family)
		}
	}
	if strings.Contains(text, "tailnet_key_expiry") {
		t.Error("a key expiry without a tailnet")
	}
}

// TestMetricsPage checks the whole page after some traffic: its lines are well-formed, and each
// histogram agrees with itself.
func TestMetricsPage(t *testing.T) {
	p := localProxy(t)
	p.metrics.requestDone(200, "POST", 2*time.Second)
	p.metrics.requestDone(200, "POST", 2*time.Hour)
	p.metrics.requestDone(200, "GET", time.Millisecond)
	p.metrics.requestDone(499, "PROPFIND", 0)
	p.metrics.requestDone(999, "get", 0)
	p.metrics.requestDone(100, "", 0)
	p.metrics.firstByte(700 * time.Millisecond)
	p.metrics.upstreamError(typeInternal)
	p.metrics.upstreamError(typeTimeout)
	p.metrics.upstreamError(typeTimeout)
	p.metrics.retries.Add(3)
	p.places.tryAcquire(7)
	p.bodies.budget.tryAcquire(1000)
	samples, text := scrape(t, p.metrics)

	for name, want := range map[string]float64{
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
		`proxy_requests_in_flight`:                                                7,
		`proxy_buffered_body_bytes`:                                               1000,
	} {
		if got, ok := samples[name]; !ok || math.Abs(got-want) > 1e-9 {
			t.Errorf("%s is %v, want %v", name, got, want)
		}
	}
	if n := p.metrics.requestsTotal(); n != 6 {
		t.Errorf("requestsTotal() = %d, want 6", n)
	}
	if n := p.metrics.errorsTotal(); n != 3 {
		t.Errorf("errorsTotal() = %d, want 3", n)
	}
	checkPage(t, samples, text)
}

// checkPage checks the form of a metrics page.
func checkPage(t *testing.T, samples map[string]float64, text string) {
	t.Helper()
	line := regexp.MustCompile(`^([a-z_]+)(\{[a-z_]+="([^"\\]|\\.)*"(,[a-z_]+="([^"\\]|\\.)*")*\})? (NaN|\+Inf|[0-9.e+-]+)$`)
	family := ""
	for text := range strings.Lines(text) {
		text = strings.TrimSuffix(text, "\n")
		if rest, ok := strings.CutPrefix(text, "# TYPE "); ok {
			family, _, _ = strings.Cut(rest, " ")
		} else if !strings.HasPrefix(text, "# HELP ") && (!line.MatchString(text) || !strings.HasPrefix(text, family)) {
			t.Errorf("in family %s: %s", family, text)
		}
	}
	infinite := regexp.MustCompile(`^(.*)_bucket(\{.*?),?le="\+Inf"\}$`)
	histograms := 0
	for name, n := range samples {
		if m := infinite.FindStringSubmatch(name); m != nil {
			histograms++
			labels := strings.TrimSuffix(m[2]+"}", "{}")
			if count, ok := samples[m[1]+"_count"+labels]; !ok || count != n {
				t.Errorf("%s is %v, its _count %v", name, n, count)
			}
		}
	}
	if histograms < 2 {
		t.Errorf("%d histograms", histograms)
	}
}

// TestMetricsConcurrently records and writes at once; the race detector looks on, and nothing may be lost.
func TestMetricsConcurrently(t *testing.T) {
	p := localProxy(t)
	const workers, each = 8, 500
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for i := range each {
				p.metrics.requestDone(200+(i+worker)%20, methods[i%len(methods)], time.Duration(i)*time.Millisecond)
				p.metrics.upstreamError(errorTypes[i%len(errorTypes)])
				p.metrics.firstByte(time.Second)
				if i%100 == 0 {
					p.metrics.page()
				}
			}
		})
	}
	wg.Wait()
	samples, text := scrape(t, p.metrics)
	checkPage(t, samples, text)
	if n, m := p.metrics.requestsTotal(), p.metrics.errorsTotal(); n != workers*each || m != workers*each {
		t.Errorf("%d requests and %d errors, want %d of each", n, m, workers*each)
	}
	if n := samples["proxy_time_to_first_byte_seconds_count"]; n != workers*each {
		t.Errorf("%v first bytes, want %d", n, workers*each)
	}
	// Each worker adds 0 to 499 ms once.
	var sum float64
	for name, n := range samples {
		if strings.HasPrefix(name, "proxy_request_duration_seconds_sum{") {
			sum += n
		}
	}
	if want := float64(workers) * 0.499 * each / 2; math.Abs(sum-want) > 1e-6 {
		t.Errorf("the durations' sum is %v, want %v", sum, want)
	}
}

// TestMetricsTailnet: the gauges follow the state of the tailnet.
func TestMetricsTailnet(t *testing.T) {
	expiry := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, row := range []struct {
		name  string
		state tailnetState
		want  string // connected, control online, key expiry
	}{
		{name: "not connected", state: tailnetState{problem: &problem{tailnetConnect, ""}, online: true}, want: "0 0 -"},
		{name: "connected", state: tailnetState{hostname: "x", online: true}, want: "1 1 -"},
		{name: "connected, control lost, key that expires", state: tailnetState{hostname: "x", keyExpiry: expiry}, want: fmt.Sprint("1 0 ", expiry.Unix())},
	} {
		t.Run(row.name, func(t *testing.T) {
			counters, tn := newMetrics(version, "x"), newTailnet("/nowhere", "x", slog.New(slog.DiscardHandler))
			tn.publish(&row.state)
			tn.gauges(counters.gauge)
			samples, _ := scrape(t, counters)
			expires := "-"
			if at, ok := samples["tailnet_key_expiry_timestamp_seconds"]; ok {
				expires = fmt.Sprint(int64(at))
			}
			if got := fmt.Sprint(samples["tailnet_connected"], samples["tailnet_control_online"], " ", expires); got != row.want {
				t.Errorf("got %s, want %s", got, row.want)
			}
		})
	}
}
