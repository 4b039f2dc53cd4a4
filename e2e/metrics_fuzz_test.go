package e2e

import (
	"bytes"
	"maps"
	"math"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// FuzzMetrics has the proxy record anything that it may meet: what it then
// writes is parsed by Prometheus's own library, and says just that. The events
// are drawn at random: the fuzzer can't see into the other process.
func FuzzMetrics(f *testing.F) {
	for i, revision := range []string{"", "0123abc", "a\"b\\c\nd\r{}=,\t\x00é\u2028 # HELP x", "\\n\\", "\n# EOF"} {
		for _, events := range []uint8{0, 1, 255} {
			f.Add(uint64(i), events, revision)
		}
	}
	parent := startServed(f)
	f.Fuzz(func(t *testing.T, seed uint64, events uint8, revision string) {
		r := randomRecords(rand.New(rand.NewPCG(seed, 0)), int(events))
		// The revision comes from whoever builds the program: text, but any.
		r.Revision = []byte(strings.ToValidUTF8(revision, "?"))
		var response struct{ Page []byte }
		proxytest.Check(t, parent.ask(map[string]any{"metrics": r}, &response))
		checkMetricsPage(t, r, response.Page)
	})
}

// durationBounds are those of the histograms, in seconds.
var durationBounds = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600}

// records are what the proxy is to record: see served_test.go of package main.
type records struct {
	Requests   []recordedRequest `json:"requests"`
	FirstBytes []time.Duration   `json:"first_bytes"`
	Errors     []string          `json:"errors"`
	Retries    uint64            `json:"retries"`
	Places     int64             `json:"places"`
	Bytes      int64             `json:"bytes"`
	KeyExpiry  int64             `json:"key_expiry"`
	Revision   []byte            `json:"revision"`
}

type recordedRequest struct {
	Status  int           `json:"status"`
	Method  []byte        `json:"method"`
	Elapsed time.Duration `json:"elapsed"`
}

var (
	namedMethods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS", "TRACE"}
	otherMethods = []string{"", "get", "BREW", "other", "\xff\"\n\\"}
	errorTypes   = []string{"timeout", "connection", "invalid_request", "response_read", "internal"}
)

// randomRecords draws as many events as asked for. Two of three are requests.
func randomRecords(random *rand.Rand, events int) *records {
	r := &records{Places: random.Int64N(1001), Bytes: random.Int64N(48<<20 + 1), KeyExpiry: int64(random.Uint64())}
	methods := slices.Concat(namedMethods, otherMethods)
	for range events {
		elapsed := randomTime(random)
		if random.IntN(3) > 0 {
			method := methods[random.IntN(len(methods))]
			r.Requests = append(r.Requests, recordedRequest{100 + random.IntN(900)/(1+random.IntN(900)), []byte(method), elapsed})
			continue
		}
		r.FirstBytes = append(r.FirstBytes, elapsed)
		r.Errors = append(r.Errors, errorTypes[random.IntN(len(errorTypes))])
		r.Retries += random.Uint64N(1 << 20)
	}
	return r
}

// randomTime draws a time about the bounds of the buckets, or of any magnitude
// of which 255 fit the 292 years that a sum has room for, negative ones too.
func randomTime(random *rand.Rand) time.Duration {
	if random.IntN(2) == 0 {
		bound := durationBounds[random.IntN(len(durationBounds))]
		return time.Duration(bound*float64(time.Second)) + time.Duration(random.IntN(3)-1)
	}
	return time.Duration(int64(random.Uint64()) >> (8 + random.IntN(56)))
}

// checkMetricsPage holds a page against what was recorded.
func checkMetricsPage(t *testing.T, r *records, page []byte) {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		t.Fatalf("%v in\n%s", err, page)
	}
	problems, err := promlint.New(bytes.NewReader(page)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", err, problems)
	}
	m := proxytest.Metrics(families)
	for _, problem := range unsound(m) {
		t.Error(problem)
	}
	requests, elapsed := map[string]float64{}, map[string][]time.Duration{}
	for _, request := range r.Requests {
		method, status := string(request.Method), strconv.Itoa(request.Status)
		if !slices.Contains(namedMethods, method) {
			method = "other"
		}
		requests[method+" "+status]++
		elapsed[status] = append(elapsed[status], request.Elapsed)
	}
	errors := map[string]float64{}
	for _, name := range errorTypes {
		errors[name] = 0
	}
	for _, name := range r.Errors {
		errors[name]++
	}
	checkSeries(t, m, "proxy_requests_total", requests)
	checkSeries(t, m, "proxy_upstream_errors_total", errors)
	checkSeries(t, m, "proxy_upstream_retries_total", map[string]float64{"": float64(r.Retries)})
	checkSeries(t, m, "proxy_requests_in_flight", map[string]float64{"": float64(r.Places)})
	checkSeries(t, m, "proxy_buffered_body_bytes", map[string]float64{"": float64(r.Bytes)})
	expiry := map[string]float64{}
	if !time.Unix(r.KeyExpiry, 0).IsZero() {
		expiry[""] = float64(r.KeyExpiry)
	}
	checkSeries(t, m, "tailnet_key_expiry_timestamp_seconds", expiry)
	checkHistograms(t, m, "proxy_request_duration_seconds", elapsed)
	checkHistograms(t, m, "proxy_time_to_first_byte_seconds", map[string][]time.Duration{"": r.FirstBytes})
	checkQuantiles(t, m, elapsed)
	if revision := string(r.Revision); revision != "" && !m.Has("proxy_build_info", "revision", revision) {
		t.Errorf("no revision %q: %v", revision, m["proxy_build_info"])
	}
}

// seriesName returns a metric's label values, in the order of the label names.
func seriesName(metric *dto.Metric) string {
	values := map[string]string{}
	for _, label := range metric.GetLabel() {
		values[label.GetName()] = label.GetValue()
	}
	var name []string
	for _, label := range slices.Sorted(maps.Keys(values)) {
		name = append(name, values[label])
	}
	return strings.Join(name, " ")
}

// checkSeries checks the values of a counter or gauge, by series.
func checkSeries(t *testing.T, m proxytest.Metrics, name string, want map[string]float64) {
	t.Helper()
	got := map[string]float64{}
	for _, metric := range m[name].GetMetric() {
		got[seriesName(metric)] += metric.GetCounter().GetValue() + metric.GetGauge().GetValue()
	}
	if !maps.Equal(got, want) {
		t.Errorf("%s is %v, want %v", name, got, want)
	}
}

// checkHistograms checks count, sum and buckets of histograms, by series.
func checkHistograms(t *testing.T, m proxytest.Metrics, name string, want map[string][]time.Duration) {
	t.Helper()
	got := map[string]bool{}
	for _, metric := range m[name].GetMetric() {
		series, h := seriesName(metric), metric.GetHistogram()
		got[series] = true
		var sum time.Duration
		for _, d := range want[series] {
			sum += d
		}
		if h.GetSampleCount() != uint64(len(want[series])) || h.GetSampleSum() != sum.Seconds() {
			t.Errorf("%s %s: count %d, sum %v; want %d, %v", name, series, h.GetSampleCount(), h.GetSampleSum(), len(want[series]), sum.Seconds())
		}
		var bounds []float64
		for _, bucket := range h.GetBucket() {
			bound, n := bucket.GetUpperBound(), uint64(0)
			bounds = append(bounds, bound)
			for _, d := range want[series] {
				if d.Seconds() <= bound {
					n++
				}
			}
			if bucket.GetCumulativeCount() != n {
				t.Errorf("%s %s: %d up to %v, want %d", name, series, bucket.GetCumulativeCount(), bound, n)
			}
		}
		if !slices.Equal(bounds, append(slices.Clone(durationBounds), math.Inf(1))) {
			t.Errorf("%s %s has the bounds %v", name, series, bounds)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s has the series %v, want those of %v", name, got, want)
	}
}

// checkQuantiles checks that each quantile lies in the bucket of the request
// that it is the time of.
func checkQuantiles(t *testing.T, m proxytest.Metrics, want map[string][]time.Duration) {
	t.Helper()
	const name = "proxy_request_duration_quantiles_seconds"
	got := map[string]bool{}
	for _, metric := range m[name].GetMetric() {
		series, s := seriesName(metric), metric.GetSummary()
		got[series] = true
		times := slices.Sorted(slices.Values(want[series]))
		var quantiles []float64
		for _, q := range s.GetQuantile() {
			quantiles = append(quantiles, q.GetQuantile())
			rank := 1
			for float64(rank) < q.GetQuantile()*float64(len(times)) {
				rank++
			}
			low, high := bucketOf(times[rank-1].Seconds())
			if v := q.GetValue(); !(low <= v && v <= high) {
				t.Errorf("%s %s: quantile %v is %v, want something from %v to %v", name, series, q.GetQuantile(), v, low, high)
			}
		}
		if !reflect.DeepEqual(quantiles, []float64{.5, .9, .99, .999}) || s.GetSampleCount() != uint64(len(times)) {
			t.Errorf("%s %s: quantiles %v of %d requests, want %d", name, series, quantiles, s.GetSampleCount(), len(times))
		}
	}
	if len(got) != len(want) {
		t.Errorf("%s has the series %v, want those of %v", name, got, want)
	}
}

// bucketOf returns the bounds of the bucket that a time falls into. For what is
// over the highest bound that bound stands.
func bucketOf(seconds float64) (low, high float64) {
	for _, high = range durationBounds {
		if seconds <= high {
			return low, high
		}
		low = high
	}
	return low, low
}
