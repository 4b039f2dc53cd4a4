package main

import (
	"encoding/json"
	"fmt"
	"math"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// series is what proxy_requests_total has a series for.
type series struct {
	status int
	method string
}

// counts are the log's lines, counted as the metrics count requests.
type counts struct {
	requests map[series]int
	errors   map[string]int // by error_type
	retries  int
	answered int // by the upstream
}

func count(lines []logLine) counts {
	c := counts{requests: map[series]int{}, errors: map[string]int{}}
	for _, l := range lines {
		c.requests[series{l.status, l.method}]++
		c.errors[l.code]++
		c.retries += max(0, l.attempts-1)
		if l.upstreamID != "" {
			c.answered++
		}
	}
	return c
}

// checkMetrics compares the metrics with the log, to the last request.
func checkMetrics(m proxytest.Metrics, lines []logLine, problems *problems) {
	c := count(lines)
	check := func(want int, name string, labels ...string) {
		if got := m.Value(name, labels...); got != float64(want) {
			problems.add("%s%v is %v, the log has %d", name, labels, got, want)
		}
	}
	check(len(lines), "proxy_requests_total")
	for s, n := range c.requests {
		check(n, "proxy_requests_total", "status", fmt.Sprint(s.status), "method", s.method)
	}
	for _, t := range errorTypes {
		check(c.errors[t], "proxy_upstream_errors_total", "error_type", t)
	}
	check(c.retries, "proxy_upstream_retries_total")
	check(c.answered, "proxy_time_to_first_byte_seconds")
	check(0, "proxy_requests_in_flight")
	check(0, "proxy_requests_queued")
	check(0, "proxy_buffered_body_bytes")
	checkDurations(m, lines, problems)
}

// checkDurations compares proxy_request_duration_seconds with the log, whose
// milliseconds are whole: a request that took as long as a bucket's bound may be on
// either side of it, and the sum is greater by up to a millisecond for each.
func checkDurations(m proxytest.Metrics, lines []logLine, problems *problems) {
	byStatus := map[string][]logLine{}
	for _, l := range lines {
		status := fmt.Sprint(l.status)
		byStatus[status] = append(byStatus[status], l)
	}
	const name = "proxy_request_duration_seconds"
	if got := len(m[name].GetMetric()); got != len(byStatus) {
		problems.add("%s has %d statuses, the log has %d", name, got, len(byStatus))
	}
	for _, metric := range m[name].GetMetric() {
		status, histogram := metric.GetLabel()[0].GetValue(), metric.GetHistogram()
		own := byStatus[status]
		if histogram.GetSampleCount() != uint64(len(own)) {
			problems.add("%s of status %s counts %d, the log has %d", name, status, histogram.GetSampleCount(), len(own))
		}
		var sum time.Duration
		for _, l := range own {
			sum += l.latency
		}
		if s := histogram.GetSampleSum(); s < sum.Seconds()-1e-6 || s > sum.Seconds()+float64(len(own))*1e-3+1e-6 {
			problems.add("%s of status %s is %v s in all, the log has %v and up to 1 ms more for each of %d",
				name, status, s, sum, len(own))
		}
		for _, bucket := range histogram.GetBucket() {
			least, most := below(own, bucket.GetUpperBound())
			if n := int(bucket.GetCumulativeCount()); n < least || n > most {
				problems.add("%s of status %s counts %d up to %v s, the log has from %d to %d",
					name, status, n, bucket.GetUpperBound(), least, most)
			}
		}
	}
}

// below returns how many of the lines took less than bound for certain, and how many
// perhaps.
func below(lines []logLine, bound float64) (least, most int) {
	if math.IsInf(bound, 1) {
		return len(lines), len(lines)
	}
	milliseconds := int64(math.Round(bound * 1e3))
	for _, l := range lines {
		if l.latency.Milliseconds() < milliseconds {
			least++
		}
		if l.latency.Milliseconds() <= milliseconds {
			most++
		}
	}
	return least, most
}

// checkHealth compares /health with the log.
func checkHealth(p *proxytest.Proxy, lines []logLine, problems *problems) {
	status, raw, err := p.Health()
	var body struct {
		Status   string
		Requests int `json:"requests_served"`
		Errors   int `json:"errors_total"`
	}
	if err == nil {
		err = json.Unmarshal(raw, &body)
	}
	c, failed := count(lines), 0
	for _, t := range errorTypes {
		failed += c.errors[t]
	}
	if err != nil || status != 200 || body.Status != "healthy" || body.Requests != len(lines) || body.Errors != failed {
		problems.add("/health has status %d, %s (%v), want healthy, %d requests and %d errors", status, raw, err, len(lines), failed)
	}
}
