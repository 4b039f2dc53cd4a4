package oracles

import (
	"bytes"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// FuzzMetrics has the proxy record anything that it may meet: what it then writes is parsed by Prometheus's own library, and says
// just that. The events are drawn at random: the fuzzer can't see into the other process.
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
		parent.ask(t, map[string]any{"metrics": r}, &response)
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

// randomTime draws a time about the bounds of the buckets, or of any magnitude up to hours, negative ones too.
func randomTime(random *rand.Rand) time.Duration {
	if random.IntN(2) == 0 {
		return time.Duration(durationBounds[random.IntN(len(durationBounds))]*float64(time.Second)) + time.Duration(random.IntN(3)-1)
	}
	return time.Duration(int64(random.Uint64()) >> (20 + random.IntN(44)))
}

// oracle has Prometheus's own client record the same, and returns what that makes of it.
func (r *records) oracle(t *testing.T) map[string]float64 {
	t.Helper()
	registry := prometheus.NewRegistry()
	with := promauto.With(registry)
	requests := with.NewCounterVec(prometheus.CounterOpts{Name: "proxy_requests_total"}, []string{"status", "method"})
	durations := with.NewHistogramVec(prometheus.HistogramOpts{Name: "proxy_request_duration_seconds", Buckets: durationBounds}, []string{"status"})
	quantiles := with.NewSummaryVec(prometheus.SummaryOpts{Name: quantilesName}, []string{"status"}) // their sums and counts; see checkQuantiles
	for _, request := range r.Requests {
		method, status := string(request.Method), strconv.Itoa(request.Status)
		if !slices.Contains(namedMethods, method) {
			method = "other"
		}
		requests.WithLabelValues(status, method).Inc()
		durations.WithLabelValues(status).Observe(request.Elapsed.Seconds())
		quantiles.WithLabelValues(status).Observe(request.Elapsed.Seconds())
	}
	firstByte := with.NewHistogram(prometheus.HistogramOpts{Name: "proxy_time_to_first_byte_seconds", Buckets: durationBounds})
	for _, elapsed := range r.FirstBytes {
		firstByte.Observe(elapsed.Seconds())
	}
	errors := with.NewCounterVec(prometheus.CounterOpts{Name: "proxy_upstream_errors_total"}, []string{"error_type"})
	for _, name := range errorTypes {
		errors.WithLabelValues(name)
	}
	for _, name := range r.Errors {
		errors.WithLabelValues(name).Inc()
	}
	with.NewCounter(prometheus.CounterOpts{Name: "proxy_upstream_retries_total"}).Add(float64(r.Retries))
	gauge := func(name string, value int64) { with.NewGauge(prometheus.GaugeOpts{Name: name}).Set(float64(value)) }
	gauge("proxy_requests_in_flight", r.Places)
	gauge("proxy_buffered_body_bytes", r.Bytes)
	if !time.Unix(r.KeyExpiry, 0).IsZero() {
		gauge("tailnet_key_expiry_timestamp_seconds", r.KeyExpiry)
	}
	all := map[string]float64{}
	for _, family := range proxytest.Must(registry.Gather())(t) {
		maps.Copy(all, samples(t, family))
	}
	return all
}

// samples returns the values of a family's series, as Prometheus stores them.
func samples(t *testing.T, family *dto.MetricFamily) map[string]float64 {
	t.Helper()
	all := map[string]float64{}
	for _, sample := range proxytest.Must(expfmt.ExtractSamples(&expfmt.DecodeOptions{}, family))(t) {
		all[sample.Metric.String()] = float64(sample.Value)
	}
	return all
}

// checkMetricsPage holds a page against what was recorded.
func checkMetricsPage(t *testing.T, r *records, page []byte) {
	t.Helper()
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(page))
	if err != nil {
		t.Fatalf("%v in\n%s", err, page)
	}
	if problems, err := promlint.New(bytes.NewReader(page)).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v, %v", err, problems)
	}
	got := map[string]float64{}
	for name, family := range families {
		if slices.Contains(recordedFamilies, name) {
			maps.Copy(got, samples(t, family))
		}
	}
	maps.DeleteFunc(got, func(series string, _ float64) bool { return strings.Contains(series, "quantile=") })
	if diff := cmp.Diff(r.oracle(t), got, cmpopts.EquateApprox(0, 1e-6)); diff != "" {
		t.Errorf("the oracle's values (-) and the proxy's (+):\n%s", diff)
	}
	checkQuantiles(t, r, families[quantilesName])
	m := proxytest.Metrics(families)
	if revision := string(r.Revision); revision != "" && !m.Has("proxy_build_info", "revision", revision) {
		t.Errorf("no revision %q: %v", revision, m["proxy_build_info"])
	}
}

const quantilesName = "proxy_request_duration_quantiles_seconds"

// recordedFamilies are those that records are of.
var recordedFamilies = []string{
	"proxy_requests_total", "proxy_request_duration_seconds", quantilesName, "proxy_time_to_first_byte_seconds", "proxy_upstream_errors_total",
	"proxy_upstream_retries_total", "proxy_requests_in_flight", "proxy_buffered_body_bytes", "tailnet_key_expiry_timestamp_seconds",
}

// checkQuantiles checks that each quantile lies in the bucket of the request that it is the time of; what is over the highest bound
// counts as that.
func checkQuantiles(t *testing.T, r *records, family *dto.MetricFamily) {
	t.Helper()
	edges := slices.Concat([]float64{0}, durationBounds, durationBounds[len(durationBounds)-1:])
	for _, metric := range family.GetMetric() {
		var times []float64
		for _, request := range r.Requests {
			if strconv.Itoa(request.Status) == metric.GetLabel()[0].GetValue() {
				times = append(times, request.Elapsed.Seconds())
			}
		}
		slices.Sort(times)
		var quantiles []float64
		for _, q := range metric.GetSummary().GetQuantile() {
			quantiles = append(quantiles, q.GetQuantile())
			rank := max(1, math.Ceil(q.GetQuantile()*float64(len(times))))
			i, _ := slices.BinarySearch(durationBounds, times[int(rank)-1])
			if v := q.GetValue(); !(edges[i] <= v && v <= edges[i+1]) {
				t.Errorf("%v: quantile %v is %v, want something from %v to %v", metric.GetLabel(), q.GetQuantile(), v, edges[i], edges[i+1])
			}
		}
		if !slices.Equal(quantiles, []float64{.5, .9, .99, .999}) {
			t.Errorf("%v: quantiles %v", metric.GetLabel(), quantiles)
		}
	}
}
