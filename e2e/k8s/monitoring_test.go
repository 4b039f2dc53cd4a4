package k8s

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"anthropic-oauth-proxy/e2e/prometheus"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// rules are those of the component.
func rules(t *testing.T) prometheus.Rules {
	t.Helper()
	return decode[struct {
		Spec struct{ Groups prometheus.Rules }
	}](t, monitoring, "PrometheusRule").Spec.Groups
}

// TestDashboard reads the dashboard as Grafana's sidecar does: docs/kubernetes.md has its panels, which show this job's series.
func TestDashboard(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	text := decode[corev1.ConfigMap](t, monitoring, "ConfigMap").Data["dashboard.json"]
	proxytest.Check(t, json.Unmarshal([]byte(text), &dashboard))
	if len(dashboard.Panels) == 0 {
		t.Error("there are no panels")
	}
	docs := string(proxytest.Must(os.ReadFile(root + "/docs/kubernetes.md"))(t))
	for _, panel := range dashboard.Panels {
		if !strings.Contains(docs, "**"+panel.Title+"**") || len(panel.Targets) == 0 {
			t.Errorf("%s is not in docs/kubernetes.md, or shows %d series", panel.Title, len(panel.Targets))
		}
		for _, target := range panel.Targets {
			own := strings.Contains(target.Expr, `job="anthropic-oauth-proxy",namespace=~"$namespace"`)
			if !own && !strings.HasPrefix(target.Expr, "vector(") {
				t.Errorf("%s shows other series, too: %s", panel.Title, target.Expr)
			}
		}
	}
}
