package k8s

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// rule is an alert or a recording rule of a PrometheusRule.
type rule struct {
	Alert       string
	Record      string
	Expr        string
	For         string
	Labels      map[string]string
	Annotations map[string]string
}

type ruleGroup struct {
	Name  string
	Rules []rule
}

// ruleGroups reads the component's PrometheusRule.
func ruleGroups(t *testing.T) []ruleGroup {
	t.Helper()
	var object struct{ Spec struct{ Groups []ruleGroup } }
	readYAML(t, "k8s/components/monitoring/prometheusrule.yaml", &object)
	return object.Spec.Groups
}

// alerts returns the alerts by name.
func alerts(t *testing.T) map[string]rule {
	t.Helper()
	byName := map[string]rule{}
	for _, group := range ruleGroups(t) {
		for _, r := range group.Rules {
			if r.Alert != "" {
				byName[r.Alert] = r
			}
		}
	}
	return byName
}

func readYAML(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// TestRunbookLinks follows every alert's link to a heading of RUNBOOK.md. Where that can be read is for users to say, so
// the committed rules have no link.
func TestRunbookLinks(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(root, "RUNBOOK.md"))
	if err != nil {
		t.Fatal(err)
	}
	var anchors []string
	for line := range strings.Lines(string(text)) {
		if heading := strings.TrimLeft(line, "#"); heading != line {
			anchors = append(anchors, anchor(heading))
		}
	}
	source, err := os.ReadFile(filepath.Join(root, "nix/monitoring.nix"))
	if err != nil {
		t.Fatal(err)
	}
	sections := regexp.MustCompile(`section = "(.*)";`).FindAllSubmatch(source, -1)
	for _, section := range sections {
		if !slices.Contains(anchors, string(section[1])) {
			t.Errorf("%s is no heading of RUNBOOK.md, which has %q", section[1], anchors)
		}
	}
	byName := alerts(t)
	if len(sections) != len(byName) {
		t.Errorf("%d sections for %d alerts", len(sections), len(byName))
	}
	for name, alert := range byName {
		if alert.Labels["severity"] == "" || alert.Annotations["summary"] == "" || alert.Annotations["description"] == "" || alert.Annotations["runbook_url"] != "" {
			t.Errorf("%s: severity, summary or description is missing, or there is a link: %v", name, alert)
		}
	}
}

// anchor is how forges name a heading in links: lower case, blanks as dashes,
// other punctuation dropped.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '_', r == '-':
			return r
		case r == ' ':
			return '-'
		default:
			return -1
		}
	}, strings.ToLower(strings.TrimSpace(heading)))
}

// TestRunbookAlerts finds the runbook's expressions among the alerts, for the series of this job and namespace, and its
// quantile among those that are summed over the statuses.
func TestRunbookAlerts(t *testing.T) {
	const own = `job="anthropic-oauth-proxy",namespace="anthropic-oauth-proxy"`
	byName := alerts(t)
	for name, want := range map[string]rule{
		"AnthropicProxyTailnetDisconnected": {Expr: "tailnet_connected{" + own + "} == 0", For: "60s"},
		"AnthropicProxyUpstreamErrors":      {Expr: "rate(proxy_upstream_errors_total{" + own + "}[5m]) > 0.1", For: "5m"},
		"AnthropicProxySlow": {
			Expr: "histogram_quantile(0.99, sum by (namespace, job, pod, le) (rate(proxy_request_duration_seconds_bucket{" + own + "}[5m]))) > 30", For: "5m",
		},
	} {
		if got := byName[name]; got.Expr != want.Expr || got.For != want.For {
			t.Errorf("%s: %s for %s, not %s for %s", name, got.Expr, got.For, want.Expr, want.For)
		}
	}
}

// TestDashboard reads the dashboard as Grafana's sidecar does.
func TestDashboard(t *testing.T) {
	component := render(t, "k8s/components/monitoring")
	for _, r := range component.Resources() {
		if r.GetKind() != "ConfigMap" {
			continue
		}
		if got := r.GetLabels()["grafana_dashboard"]; got != "1" {
			t.Errorf("the label grafana_dashboard is %q", got)
		}
		var dashboard struct {
			UID    string
			Panels []struct {
				ID                 int
				Title, Description string
				FieldConfig        struct{ Defaults struct{ Unit string } }
				Targets            []struct{ Expr, RefID string }
			}
		}
		if err := json.Unmarshal([]byte(r.GetDataMap()["dashboard.json"]), &dashboard); err != nil {
			t.Fatal(err)
		}
		docs, err := os.ReadFile("../../docs/kubernetes.md")
		if err != nil {
			t.Fatal(err)
		}
		ids := map[int]bool{}
		for _, panel := range dashboard.Panels {
			if ids[panel.ID] || len(panel.Targets) == 0 {
				t.Errorf("panel %q: its id %d is taken or it shows nothing", panel.Title, panel.ID)
			}
			ids[panel.ID] = true
			if !strings.Contains(string(docs), "**"+panel.Title+"**") {
				t.Errorf("docs/kubernetes.md does not list the panel %q", panel.Title)
			}
			if panel.Description == "" || panel.FieldConfig.Defaults.Unit == "" {
				t.Errorf("panel %q has no description or no unit", panel.Title)
			}
			for _, target := range panel.Targets {
				if !strings.Contains(target.Expr, `job="anthropic-oauth-proxy",namespace=~"$namespace"`) && !strings.HasPrefix(target.Expr, "vector(") {
					t.Errorf("panel %q shows series of others: %s", panel.Title, target.Expr)
				}
			}
		}
		if len(ids) == 0 || dashboard.UID == "" {
			t.Error("the dashboard has no panels or no uid")
		}
		return
	}
	t.Error("the component has no ConfigMap")
}
