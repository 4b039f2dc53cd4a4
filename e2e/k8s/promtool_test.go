//go:build promtool

// The rules under Prometheus' own test runner, which is no Go library: go -C e2e test -tags promtool ./k8s
package k8s

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// promtool runs Prometheus' own tool on a file with that content, beside the rules.
func promtool(t *testing.T, content any, args ...string) {
	t.Helper()
	if _, err := exec.LookPath("promtool"); err != nil {
		t.Fatalf("%v: Debian's package prometheus has it", err)
	}
	dir := t.TempDir()
	write := func(name string, content any) string {
		text, err := json.Marshal(content) // JSON is YAML
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	var spec struct{ Spec map[string]any }
	readYAML(t, "k8s/components/monitoring/prometheusrule.yaml", &spec)
	file := write("rules.json", spec.Spec)
	if content != nil {
		file = write("test.json", content)
	}
	out, err := exec.Command("promtool", append(args, file)...).CombinedOutput()
	if err != nil {
		t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// labelled adds labels to the series.
func (s series) labelled(labels string) series {
	name, rest, has := strings.Cut(s.Series, "{")
	if !has {
		rest = "}"
	}
	return series{name + "{" + labels + "," + rest, s.Values}
}

func TestPrometheusRules(t *testing.T) { promtool(t, nil, "check", "rules") }

// series are samples, one a minute, in promtool's notation.
type series struct {
	Series string `json:"series"`
	Values string `json:"values"`
}

// TestAlerts drives each alert to firing, and shows what is next to it and does not fire.
func TestAlerts(t *testing.T) {
	bucket := func(status, le, values string) series {
		return series{fmt.Sprintf(`proxy_request_duration_seconds_bucket{status=%q, le=%q}`, status, le), values}
	}
	requests := func(status, values string) series {
		return series{fmt.Sprintf(`proxy_requests_total{status=%q}`, status), values}
	}
	cases := []struct {
		name  string
		alert string
		input []series
		at    string
		fires int // how many series of the alert
	}{
		{"a minute without tailnet", "TailnetDisconnected", []series{{"tailnet_connected", "1 0 0 0"}}, "3m", 1},
		{"tailnet back within a minute", "TailnetDisconnected", []series{{"tailnet_connected", "1 0 1 1"}}, "3m", 0},
		{"one error every five seconds", "UpstreamErrors", []series{{`proxy_upstream_errors_total{error_type="connection"}`, "0+12x20"}}, "15m", 1},
		{"one error every twenty seconds", "UpstreamErrors", []series{{`proxy_upstream_errors_total{error_type="connection"}`, "0+3x20"}}, "15m", 0},
		{"errors that have lasted for three minutes", "UpstreamErrors", []series{{`proxy_upstream_errors_total{error_type="timeout"}`, "0x10 0+60x3"}}, "14m", 0},
		{"two types of errors", "UpstreamErrors", []series{
			{`proxy_upstream_errors_total{error_type="connection"}`, "0+12x20"},
			{`proxy_upstream_errors_total{error_type="timeout"}`, "0+12x20"},
		}, "15m", 2},
		{"two in a hundred take a minute", "Slow", []series{
			bucket("200", "30", "0+98x20"), bucket("200", "60", "0+100x20"), bucket("200", "+Inf", "0+100x20"),
		}, "15m", 1},
		{"one in two hundred takes a minute", "Slow", []series{
			bucket("200", "30", "0+199x20"), bucket("200", "60", "0+200x20"), bucket("200", "+Inf", "0+200x20"),
		}, "15m", 0},
		{"all of a rare status take a minute", "Slow", []series{
			bucket("200", "30", "0+1000x20"), bucket("200", "60", "0+1000x20"), bucket("200", "+Inf", "0+1000x20"),
			bucket("504", "30", "0x20"), bucket("504", "60", "0+1x20"), bucket("504", "+Inf", "0+1x20"),
		}, "15m", 0},
		{"no requests", "Slow", []series{
			bucket("200", "30", "5x20"), bucket("200", "60", "9x20"), bucket("200", "+Inf", "9x20"),
		}, "15m", 0},
		{"a key that ends in six days", "KeyExpires", []series{{"tailnet_key_expiry_timestamp_seconds", "518400x120"}}, "90m", 1},
		{"a key that ends in eight days", "KeyExpires", []series{{"tailnet_key_expiry_timestamp_seconds", "691200x120"}}, "90m", 0},
		{"a key that never ends", "KeyExpires", []series{{"tailnet_connected", "1x120"}}, "90m", 0},
		{"a queue for six minutes", "Queue", []series{{"proxy_requests_queued", "0 1x10"}}, "7m", 1},
		{"a queue that empties in between", "Queue", []series{{"proxy_requests_queued", "0 1 1 1 1 0 1 1 1"}}, "8m", 0},
		{"a target that is down", "ScrapeMissing", []series{{"up", "1 0x10"}}, "8m", 1},
		{"no target at all", "ScrapeMissing", []series{{"unrelated", "1x10"}}, "8m", 1},
		{"a target that is up", "ScrapeMissing", []series{{"up", "1x10"}}, "8m", 0},
		{"a target away for a restart", "ScrapeMissing", []series{{"up", "1 1 _ _ 1x10"}}, "8m", 0},
		{"nine in ten connections", "Connections", []series{{"proxy_connections", "1000x10"}, {"proxy_connections_limit", "1077x10"}}, "8m", 1},
		{"eight in ten connections", "Connections", []series{{"proxy_connections", "900x10"}, {"proxy_connections_limit", "1077x10"}}, "8m", 0},
		{"115 of 128 MiB", "Memory", []series{{"process_resident_memory_bytes", "120586240x10"}}, "8m", 1},
		{"100 of 128 MiB", "Memory", []series{{"process_resident_memory_bytes", "104857600x10"}}, "8m", 0},
		{"a tenth is 429", "Throttled", []series{requests("200", "0+90x20"), requests("429", "0+10x20")}, "15m", 1},
		{"a fiftieth is 429", "Throttled", []series{requests("200", "0+98x20"), requests("429", "0+2x20")}, "15m", 0},
		{"a tenth is 529", "Overloaded", []series{requests("200", "0+90x20"), requests("529", "0+10x20")}, "15m", 1},
		{"a tenth is 429, and none 529", "Overloaded", []series{requests("200", "0+90x20"), requests("429", "0+10x20")}, "15m", 0},
		{"some 500 and 502", "ServerErrors", []series{requests("200", "0+90x20"), requests("500", "0+5x20"), requests("502", "0+5x20")}, "15m", 1},
		{"a tenth is 529, and no other 5xx", "ServerErrors", []series{requests("200", "0+90x20"), requests("529", "0+10x20")}, "15m", 0},
		{"dropped lines", "LogLinesDropped", []series{{"proxy_log_lines_dropped_total", "0 0 5x10"}}, "5m", 1},
		{"lines that were dropped long ago", "LogLinesDropped", []series{{"proxy_log_lines_dropped_total", "5x30"}}, "30m", 0},
	}
	outcomes := map[string][2]bool{}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			name := "AnthropicProxy" + c.alert
			if _, ok := alerts(t)[name]; !ok {
				t.Fatalf("there is no alert %s", name)
			}
			var tests []any
			for labels, fires := range map[string]int{
				`job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"`: c.fires,
				// Others have series of the same names.
				`job="another",namespace="anthropic-oauth-proxy"`: 0,
				`job="anthropic-oauth-proxy",namespace="another"`: 0,
			} {
				if c.alert == "ScrapeMissing" && strings.Contains(labels, "another") {
					fires = 1 // ours is missing
				}
				var input []series
				for _, s := range c.input {
					input = append(input, s.labelled(labels))
				}
				count := map[string]any{ // promtool 2.42 wants every label and annotation of an alert, so count them instead
					"expr": fmt.Sprintf(`count(ALERTS{alertname=%q, alertstate="firing"}) or vector(0)`, name), "eval_time": c.at,
					"exp_samples": []any{map[string]any{"labels": "{}", "value": fires}},
				}
				tests = append(tests, map[string]any{"interval": "1m", "input_series": input, "promql_expr_test": []any{count}})
			}
			promtool(t, map[string]any{"rule_files": []string{"rules.json"}, "evaluation_interval": "1m", "tests": tests}, "test", "rules")
		})
		seen := outcomes["AnthropicProxy"+c.alert]
		seen[min(c.fires, 1)] = true
		outcomes["AnthropicProxy"+c.alert] = seen
	}
	for name := range alerts(t) {
		if outcomes[name] != [2]bool{true, true} {
			t.Errorf("%s: no case in which it fires, or none in which it does not", name)
		}
	}
}

// TestRecordedQuantiles puts a figure on each recording rule.
func TestRecordedQuantiles(t *testing.T) {
	input := []series{
		{`proxy_request_duration_seconds_bucket{status="200", le="1"}`, "0+50x20"},
		{`proxy_request_duration_seconds_bucket{status="200", le="2.5"}`, "0+100x20"},
		{`proxy_request_duration_seconds_bucket{status="200", le="+Inf"}`, "0+100x20"},
	}
	for i := range input {
		input[i] = input[i].labelled(`job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"`)
	}
	var want []any
	for name, value := range map[string]float64{"p50": 1, "p90": 2.2, "p99": 2.47, "p999": 2.497} {
		record := "pod:proxy_request_duration_seconds:" + name + "_rate5m"
		want = append(want, map[string]any{
			"expr": fmt.Sprintf("round(%s, 0.0001)", record), "eval_time": "15m",
			"exp_samples": []any{map[string]any{"labels": `{job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"}`, "value": value}},
		})
	}
	promtool(t, map[string]any{
		"rule_files": []string{"rules.json"}, "evaluation_interval": "1m",
		"tests": []any{map[string]any{"interval": "1m", "input_series": input, "promql_expr_test": want}},
	}, "test", "rules")
}
