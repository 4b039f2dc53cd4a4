//go:build promtool

// The rules under Prometheus' own test runner, which is no Go library: go -C e2e test -tags promtool ./k8s
package k8s

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// The labels of the proxy's series, and of others.
const (
	own            = `job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"`
	otherJob       = `job="another",namespace="anthropic-oauth-proxy"`
	otherNamespace = `job="anthropic-oauth-proxy",namespace="another"`
)

// TestAlerts drives each alert to firing, and shows what is next to it and does not fire. Those of the contract's runbook have
// their limit and their time between two cases. Others have series of the same names, of which no alert comes.
func TestAlerts(t *testing.T) {
	errorsOf := func(kind, values string) string {
		return fmt.Sprintf(`proxy_upstream_errors_total{error_type=%q} %s; `, kind, values)
	}
	requests := func(status, values string) string {
		return fmt.Sprintf(`proxy_requests_total{status=%q} %s; `, status, values)
	}
	took := func(status, half, minute string) string { // how many took half a minute at most, and how many a minute
		const format = `proxy_request_duration_seconds_bucket{status=%q,le=%q} %s; `
		return fmt.Sprintf(format+format+format, status, "30", half, status, "60", minute, status, "+Inf", minute)
	}
	firing := func(alert string) string {
		return fmt.Sprintf(`count(ALERTS{alertname="AnthropicProxy%s",alertstate="firing"}) or vector(0)`, alert)
	}
	tests := []object{unit("up{"+otherJob+"} 1x10; up{"+otherNamespace+"} 1x10", "8m", firing("ScrapeMissing"), 1)}
	seen := map[bool][]string{} // alerts that fired, and those that did not
	for _, c := range []struct {
		name  string
		alert string
		input string // series without their common labels, and one sample a minute in promtool's notation
		at    string
		fires int // how many series of the alert
	}{
		{"a minute without tailnet", "TailnetDisconnected", "tailnet_connected{} 1 0 0", "2m", 1},
		{"less without tailnet", "TailnetDisconnected", "tailnet_connected{} 1 0 0", "1m", 0},
		{"tailnet back within a minute", "TailnetDisconnected", "tailnet_connected{} 1 0 1 1", "3m", 0},
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
		{"a key that ends in six days", "KeyExpires", "tailnet_key_expiry_timestamp_seconds{} 518400x120", "90m", 1},
		{"a key that ends in eight days", "KeyExpires", "tailnet_key_expiry_timestamp_seconds{} 691200x120", "90m", 0},
		{"a key that never ends", "KeyExpires", "tailnet_connected{} 1x120", "90m", 0},
		{"a queue for six minutes", "Queue", "proxy_requests_queued{} 0 1x10", "7m", 1},
		{"a queue that empties in between", "Queue", "proxy_requests_queued{} 0 1 1 1 1 0 1 1 1", "8m", 0},
		{"a target that is down", "ScrapeMissing", "up{} 1 0x10", "8m", 1},
		{"no target at all", "ScrapeMissing", "unrelated{} 1x10", "8m", 1},
		{"a target that is up", "ScrapeMissing", "up{} 1x10", "8m", 0},
		{"a target away for a restart", "ScrapeMissing", "up{} 1 1 _ _ 1x10", "8m", 0},
		{"nine in ten connections", "Connections", "proxy_connections{} 1000x10; proxy_connections_limit{} 1077x10", "8m", 1},
		{"eight in ten connections", "Connections", "proxy_connections{} 900x10; proxy_connections_limit{} 1077x10", "8m", 0},
		{"115 of 128 MiB", "Memory", "process_resident_memory_bytes{} 120586240x10", "8m", 1},
		{"100 of 128 MiB", "Memory", "process_resident_memory_bytes{} 104857600x10", "8m", 0},
		{"a tenth is 429", "Throttled", requests("200", "0+90x20") + requests("429", "0+10x20"), "15m", 1},
		{"a fiftieth is 429", "Throttled", requests("200", "0+98x20") + requests("429", "0+2x20"), "15m", 0},
		{"a tenth is 529", "Overloaded", requests("200", "0+90x20") + requests("529", "0+10x20"), "15m", 1},
		{"a tenth is 429, and none 529", "Overloaded", requests("200", "0+90x20") + requests("429", "0+10x20"), "15m", 0},
		{"some 500 and 502", "ServerErrors", requests("200", "0+90x20") + requests("500", "0+5x20") + requests("502", "0+5x20"), "15m", 1},
		{"a tenth is 529, and no other 5xx", "ServerErrors", requests("200", "0+90x20") + requests("529", "0+10x20"), "15m", 0},
		{"dropped lines", "LogLinesDropped", "proxy_log_lines_dropped_total{} 0 0 5x10", "5m", 1},
		{"lines that were dropped long ago", "LogLinesDropped", "proxy_log_lines_dropped_total{} 5x30", "30m", 0},
	} {
		seen[c.fires > 0] = append(seen[c.fires > 0], "AnthropicProxy"+c.alert)
		input := ""
		for _, labels := range []string{own, otherJob, otherNamespace} {
			input += strings.ReplaceAll(strings.TrimSuffix(c.input, "; "), "{", "{"+labels+",") + "; "
		}
		tests = append(tests, unit(input, c.at, firing(c.alert)+" # "+c.name, float64(c.fires)))
	}
	promtool(t, tests)
	for _, alert := range rules(t).Names("alert") {
		if !slices.Contains(seen[true], alert) || !slices.Contains(seen[false], alert) {
			t.Errorf("%s: no case in which it fires, or none in which it does not", alert)
		}
	}
}

// TestRecordedQuantiles puts a figure on each recording rule.
func TestRecordedQuantiles(t *testing.T) {
	const bucket = `proxy_request_duration_seconds_bucket{` + own + `,status="200",le=`
	const input = bucket + `"1"} 0+50x20; ` + bucket + `"2.5"} 0+100x20; ` + bucket + `"+Inf"} 0+100x20`
	var tests []object
	for name, value := range map[string]float64{"p50": 1, "p90": 2.2, "p99": 2.47, "p999": 2.497} {
		recorded := fmt.Sprintf("round(sum(pod:proxy_request_duration_seconds:%s_rate5m{%s}), 0.0001)", name, own)
		tests = append(tests, unit(input, "15m", recorded, value))
	}
	promtool(t, tests)
}

// unit is a test for promtool: of these series, an expression has this value at a time. That promtool 2.42 compares alerts only
// with every label and annotation is why they are counted.
func unit(input, at, expr string, value float64) object {
	var series []object
	for one := range strings.SplitSeq(strings.TrimSuffix(input, "; "), "; ") {
		metric, values, _ := strings.Cut(one, " ")
		series = append(series, object{"series": metric, "values": values})
	}
	want := object{"expr": expr, "eval_time": at, "exp_samples": []object{{"labels": "{}", "value": value}}}
	return object{"interval": "1m", "input_series": series, "promql_expr_test": []object{want}}
}

// promtool runs tests of the rules.
func promtool(t *testing.T, tests []object) {
	t.Helper()
	dir := t.TempDir()
	proxytest.Check(t, rules(t).Write(filepath.Join(dir, "rules.json")))
	text := proxytest.Must(json.Marshal(object{"rule_files": []string{"rules.json"}, "evaluation_interval": "1m", "tests": tests}))(t)
	file := filepath.Join(dir, "test.json") // JSON is YAML
	proxytest.Check(t, os.WriteFile(file, text, 0o600))
	if out, err := exec.Command("promtool", "test", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool, which Debian's package prometheus has: %v\n%s", err, out)
	}
}
