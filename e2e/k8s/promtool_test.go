//go:build promtool

// The rules under Prometheus' own test runner, which is no Go library: go -C e2e test -tags promtool ./k8s
package k8s

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// own are the labels of the proxy's series.
const own = `job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"`

// TestAlerts drives each alert to firing, and shows what is next to it and does not fire. Those of the contract's runbook have
// their limit and their time between two cases.
func TestAlerts(t *testing.T) {
	const up, keyExpiry = "up", "tailnet_key_expiry_timestamp_seconds"
	errorsOf := func(kind, values string) string {
		return fmt.Sprintf(`proxy_upstream_errors_total{error_type=%q} %s; `, kind, values)
	}
	requests := func(status, values string) string {
		return fmt.Sprintf(`proxy_requests_total{status=%q} %s; `, status, values)
	}
	took := func(status, half, minute string) (all string) { // how many took half a minute at most, and how many a minute
		for le, values := range map[string]string{"30": half, "60": minute, "+Inf": minute} {
			all += fmt.Sprintf(`proxy_request_duration_seconds_bucket{status=%q,le=%q} %s; `, status, le, values)
		}
		return all
	}
	outcomes := map[string][2]bool{}
	for _, c := range []struct {
		name  string
		alert string
		input string // series, and one sample a minute in promtool's notation
		at    string
		fires int // how many series of the alert
	}{
		{"a minute without tailnet", "TailnetDisconnected", "tailnet_connected 1 0 0", "2m", 1},
		{"less without tailnet", "TailnetDisconnected", "tailnet_connected 1 0 0", "1m", 0},
		{"tailnet back within a minute", "TailnetDisconnected", "tailnet_connected 1 0 1 1", "3m", 0},
		{"eleven errors in 100 s", "UpstreamErrors", errorsOf("connection", "0+6.6x20"), "15m", 1},
		{"nine errors in 100 s", "UpstreamErrors", errorsOf("connection", "0+5.4x20"), "15m", 0},
		{"errors for four minutes", "UpstreamErrors", errorsOf("timeout", "0x10 0+60x9"), "16m", 0},
		{"errors for five minutes", "UpstreamErrors", errorsOf("timeout", "0x10 0+60x9"), "17m", 1},
		{"two types of errors", "UpstreamErrors", errorsOf("connection", "0+12x20") + errorsOf("timeout", "0+12x20"), "15m", 2},
		{"eleven in a thousand take longer for five minutes", "Slow", took("200", "0x10 0+989x9", "0x10 0+1000x9"), "17m", 1},
		{"eleven in a thousand take longer for four minutes", "Slow", took("200", "0x10 0+989x9", "0x10 0+1000x9"), "16m", 0},
		{"nine in a thousand take longer", "Slow", took("200", "0+991x20", "0+1000x20"), "15m", 0},
		{"all of a rare status take longer", "Slow", took("200", "0+1000x20", "0+1000x20") + took("504", "0x20", "0+1x20"), "15m", 0},
		{"no requests", "Slow", took("200", "5x20", "9x20"), "15m", 0},
		{"a key that ends in six days", "KeyExpires", keyExpiry + " 518400x120", "90m", 1},
		{"a key that ends in eight days", "KeyExpires", keyExpiry + " 691200x120", "90m", 0},
		{"a key that never ends", "KeyExpires", "tailnet_connected 1x120", "90m", 0},
		{"a queue for six minutes", "Queue", "proxy_requests_queued 0 1x10", "7m", 1},
		{"a queue that empties in between", "Queue", "proxy_requests_queued 0 1 1 1 1 0 1 1 1", "8m", 0},
		{"a target that is down", "ScrapeMissing", up + " 1 0x10", "8m", 1},
		{"no target at all", "ScrapeMissing", "unrelated 1x10", "8m", 1},
		{"a target that is up", "ScrapeMissing", up + " 1x10", "8m", 0},
		{"a target away for a restart", "ScrapeMissing", up + " 1 1 _ _ 1x10", "8m", 0},
		{"nine in ten connections", "Connections", "proxy_connections 1000x10; proxy_connections_limit 1077x10", "8m", 1},
		{"eight in ten connections", "Connections", "proxy_connections 900x10; proxy_connections_limit 1077x10", "8m", 0},
		{"115 of 128 MiB", "Memory", "process_resident_memory_bytes 120586240x10", "8m", 1},
		{"100 of 128 MiB", "Memory", "process_resident_memory_bytes 104857600x10", "8m", 0},
		{"a tenth is 429", "Throttled", requests("200", "0+90x20") + requests("429", "0+10x20"), "15m", 1},
		{"a fiftieth is 429", "Throttled", requests("200", "0+98x20") + requests("429", "0+2x20"), "15m", 0},
		{"a tenth is 529", "Overloaded", requests("200", "0+90x20") + requests("529", "0+10x20"), "15m", 1},
		{"a tenth is 429, and none 529", "Overloaded", requests("200", "0+90x20") + requests("429", "0+10x20"), "15m", 0},
		{"some 500 and 502", "ServerErrors", requests("200", "0+90x20") + requests("500", "0+5x20") + requests("502", "0+5x20"), "15m", 1},
		{"a tenth is 529, and no other 5xx", "ServerErrors", requests("200", "0+90x20") + requests("529", "0+10x20"), "15m", 0},
		{"dropped lines", "LogLinesDropped", "proxy_log_lines_dropped_total 0 0 5x10", "5m", 1},
		{"lines that were dropped long ago", "LogLinesDropped", "proxy_log_lines_dropped_total 5x30", "30m", 0},
	} {
		name := "AnthropicProxy" + c.alert
		seen := outcomes[name]
		seen[min(c.fires, 1)] = true
		outcomes[name] = seen
		t.Run(c.name, func(t *testing.T) {
			fires := fmt.Sprintf(`count(ALERTS{alertname=%q,alertstate="firing"}) or vector(0)`, name)
			others := 0 // others have series of the same names
			if c.alert == "ScrapeMissing" {
				others = 1 // ours is missing
			}
			evaluate(t, own, c.input, c.at, map[string]float64{fires: float64(c.fires)})
			evaluate(t, `job="another",namespace="anthropic-oauth-proxy"`, c.input, c.at, map[string]float64{fires: float64(others)})
			evaluate(t, `job="anthropic-oauth-proxy",namespace="another"`, c.input, c.at, map[string]float64{fires: float64(others)})
		})
	}
	_, alerts := rules(t)
	for name := range alerts {
		if outcomes[name] != [2]bool{true, true} {
			t.Errorf("%s: no case in which it fires, or none in which it does not", name)
		}
	}
}

// TestRecordedQuantiles puts a figure on each recording rule.
func TestRecordedQuantiles(t *testing.T) {
	const bucket = `proxy_request_duration_seconds_bucket{status="200",le=`
	want := map[string]float64{}
	for name, value := range map[string]float64{"p50": 1, "p90": 2.2, "p99": 2.47, "p999": 2.497} {
		want[fmt.Sprintf("round(sum(pod:proxy_request_duration_seconds:%s_rate5m{%s}), 0.0001)", name, own)] = value
	}
	evaluate(t, own, bucket+`"1"} 0+50x20; `+bucket+`"2.5"} 0+100x20; `+bucket+`"+Inf"} 0+100x20`, "15m", want)
}

// evaluate has promtool run the rules over series with these labels, and compare what expressions then are. That promtool 2.42
// compares alerts only with every label and annotation is why they are counted.
func evaluate(t *testing.T, labels, input, at string, want map[string]float64) {
	t.Helper()
	type object = map[string]any
	var series, expressions []object
	for one := range strings.SplitSeq(strings.TrimSuffix(input, "; "), "; ") {
		metric, values, _ := strings.Cut(one, " ")
		metric, rest, _ := strings.Cut(metric, "{")
		series = append(series, object{"series": metric + "{" + labels + "," + cmp.Or(rest, "}"), "values": values})
	}
	for expr, value := range want {
		expressions = append(expressions, object{"expr": expr, "eval_time": at, "exp_samples": []object{{"labels": "{}", "value": value}}})
	}
	test := object{"interval": "1m", "input_series": series, "promql_expr_test": expressions}
	text, err := json.Marshal(object{"rule_files": []string{"rules.json"}, "evaluation_interval": "1m", "tests": []object{test}}) // JSON is YAML
	groups, _ := rules(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "test.json")
	proxytest.Check(t, errors.Join(err, groups.Write(filepath.Join(dir, "rules.json")), os.WriteFile(file, text, 0o600)))
	if out, err := exec.Command("promtool", "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool, which Debian's package prometheus has: %v\n%s", err, out)
	}
}
