package k8s

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/prometheus"
	"anthropic-oauth-proxy/e2e/proxytest"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// component decodes the object of a kind in the monitoring component.
func component(t *testing.T, kind string, into any) {
	t.Helper()
	for _, r := range render(t, "k8s/components/monitoring").Resources() {
		if r.GetKind() == kind {
			proxytest.Check(t, yaml.Unmarshal([]byte(r.MustYaml()), into))
			return
		}
	}
	t.Fatalf("the component has no %s", kind)
}

// rules returns all, and the alerts by name.
func rules(t *testing.T) (groups prometheus.Rules, alerts map[string]prometheus.Rule) {
	t.Helper()
	var object struct {
		Spec struct{ Groups prometheus.Rules }
	}
	component(t, "PrometheusRule", &object)
	alerts = map[string]prometheus.Rule{}
	for _, group := range object.Spec.Groups {
		for _, rule := range group.Rules {
			if rule.Alert != "" {
				alerts[rule.Alert] = rule
			}
		}
	}
	return object.Spec.Groups, alerts
}

// TestPodMonitor: Prometheus finds the pods' own port, and its series get the label job that the alerts ask for.
func TestPodMonitor(t *testing.T) {
	var monitor struct {
		Spec struct {
			JobLabel            string
			Selector            metav1.LabelSelector
			PodMetricsEndpoints []struct{ Port, Path string }
		}
	}
	component(t, "PodMonitor", &monitor)
	m, endpoint := load(t, onePod), only(t, monitor.Spec.PodMetricsEndpoints)
	check(t, []fact{
		{"selector", monitor.Spec.Selector.MatchLabels, m.selector},
		{"port", ports(m)[endpoint.Port], 8081},
		{"path", endpoint.Path, "/metrics"},
		{"job", m.pod.Labels[monitor.Spec.JobLabel], name},
	}...)
}

// TestRunbookLinks: every alert belongs to a section of RUNBOOK.md, to which it links where users say where that can be read.
func TestRunbookLinks(t *testing.T) {
	runbook, source := proxytest.Must(os.ReadFile(root+"/RUNBOOK.md"))(t), proxytest.Must(os.ReadFile(root+"/nix/monitoring.nix"))(t)
	var anchors []string // lower case, blanks as dashes, other punctuation dropped
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(runbook), -1) {
		kept := regexp.MustCompile(`[^a-z0-9_ -]`).ReplaceAllString(strings.ToLower(heading[1]), "")
		anchors = append(anchors, strings.ReplaceAll(kept, " ", "-"))
	}
	sections := regexp.MustCompile(`section = "(.*)";`).FindAllStringSubmatch(string(source), -1)
	for _, section := range sections {
		check(t, fact{"RUNBOOK.md has the heading " + section[1], slices.Contains(anchors, section[1]), true})
	}
	_, alerts := rules(t)
	check(t, fact{"sections", len(sections), len(alerts)})
}

// TestDashboard reads the dashboard as Grafana's sidecar does, which finds it by its label.
func TestDashboard(t *testing.T) {
	var configMap corev1.ConfigMap
	component(t, "ConfigMap", &configMap)
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	proxytest.Check(t, json.Unmarshal([]byte(configMap.Data["dashboard.json"]), &dashboard))
	check(t, fact{"grafana_dashboard", configMap.Labels["grafana_dashboard"], "1"}, fact{"no panels", len(dashboard.Panels) == 0, false})
	docs := string(proxytest.Must(os.ReadFile(root + "/docs/kubernetes.md"))(t))
	for _, panel := range dashboard.Panels {
		listed := strings.Contains(docs, "**"+panel.Title+"**")
		check(t, fact{panel.Title + " is in docs/kubernetes.md", listed, true}, fact{panel.Title + " is empty", len(panel.Targets) == 0, false})
		for _, target := range panel.Targets {
			own := strings.Contains(target.Expr, `job="anthropic-oauth-proxy",namespace=~"$namespace"`) || strings.HasPrefix(target.Expr, "vector(")
			check(t, fact{"it shows the series of this job: " + target.Expr, own, true})
		}
	}
}
