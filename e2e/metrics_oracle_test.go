package e2e

import (
	"fmt"
	"math"
	"net/http"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// lint checks what promtool's "check metrics" checks.
func lint(t *testing.T, p *proxytest.Proxy) {
	t.Helper()
	resp := proxytest.Must(http.Get(p.URL() + "/metrics"))(t)
	defer resp.Body.Close()
	problems := proxytest.Must(promlint.New(resp.Body).Lint())(t)
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
