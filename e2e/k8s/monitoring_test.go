package k8s

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/prometheus"
	"anthropic-oauth-proxy/e2e/proxytest"
	corev1 "k8s.io/api/core/v1"
)

// rules are those of the component.
func rules(t *testing.T) prometheus.Rules {
	t.Helper()
	return decode[struct {
		Spec struct{ Groups prometheus.Rules }
	}](t, monitoring, "PrometheusRule").Spec.Groups
}

// TestDashboard reads the dashboard as Grafana's sidecar does: docs/kubernetes.md names its panels, which show the series of this job.
func TestDashboard(t *testing.T) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	proxytest.Check(t, json.Unmarshal([]byte(decode[corev1.ConfigMap](t, monitoring, "ConfigMap").Data["dashboard.json"]), &dashboard))
	if len(dashboard.Panels) == 0 {
		t.Error("there are no panels")
	}
	docs := string(proxytest.Must(os.ReadFile(root + "/docs/kubernetes.md"))(t))
	for _, panel := range dashboard.Panels {
		if !strings.Contains(docs, "**"+panel.Title+"**") {
			t.Errorf("docs/kubernetes.md does not have %s", panel.Title)
		}
		if len(panel.Targets) == 0 {
			t.Errorf("%s is empty", panel.Title)
		}
		for _, target := range panel.Targets {
			if !strings.Contains(target.Expr, `job="anthropic-oauth-proxy",namespace=~"$namespace"`) && !strings.HasPrefix(target.Expr, "vector(") {
				t.Errorf("%s shows other series, too: %s", panel.Title, target.Expr)
			}
		}
	}
}
