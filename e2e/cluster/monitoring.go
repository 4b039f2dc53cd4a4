package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/prometheus"

	corev1 "k8s.io/api/core/v1"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// discover answers as the Prometheus operator would have the PodMonitor of k8s/components/monitoring read: the running pods, with
// the labels that their series get.
func (t *test) discover(w http.ResponseWriter, r *http.Request) {
	targets := []object{}
	_, err := t.try(r.Context(), func(t *test) {
		for _, p := range t.pods() {
			if p.Status.Phase == corev1.PodRunning && p.Status.PodIP != "" {
				targets = append(targets, object{
					"targets": []string{p.Status.PodIP + ":8081"},
					"labels":  object{"namespace": p.Namespace, "pod": p.Name, "container": "proxy", "job": p.Labels["app.kubernetes.io/name"]},
				})
			}
		}
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway) // Prometheus keeps what it has
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(targets)
}

// monitoringApplied installs the operator's CRDs and applies the component, which
// the API server then holds against them, unknown fields included.
func monitoringApplied(t *test) {
	t.kubectl("apply", "--server-side", "-f", t.crds+"/monitoring.coreos.com_podmonitors.yaml", "-f", t.crds+"/monitoring.coreos.com_prometheusrules.yaml")
	t.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/podmonitors.monitoring.coreos.com", "crd/prometheusrules.monitoring.coreos.com")
	t.overlay.monitoring = true
	if line := findLine(t.apply(t.overlay, "--validate=strict"), "Warning"); line != "" {
		t.errorf("%s", line)
	}
	t.heal()
}

// scraped starts Prometheus, and waits until it has the pod's figures and every recorded one.
func scraped(t *test) {
	rules := get[struct {
		Spec struct{ Groups prometheus.Rules }
	}](t, "prometheusrule", name).Spec.Groups
	records := rules.Names("record")
	discovery := httptest.NewServer(http.HandlerFunc(t.whole.discover))
	t.whole.cleanup(discovery.Close)
	var err error
	t.prometheus, err = prometheus.Start(t.dir, discovery.URL, rules)
	t.check(err)
	t.whole.cleanup(func() { t.whole.check(t.prometheus.Close()) })
	t.check(t.prometheus.Await(t.ctx, "up{"+job+"} == 1"))
	t.traffic()
	for _, record := range records {
		t.check(t.prometheus.Await(t.ctx, record+" >= 0")) // NaN is not
	}
	t.report("the target is up, %d recording rules have figures", len(records))
}

// traffic makes some requests, seen by at least two scrapes, so that rates exist.
func (t *test) traffic() {
	for range 2 {
		url := t.tailnetURL() + messages
		t.ask(t.client, url, proxytest.Message)
		t.ask(t.client, url, proxytest.Message)
		t.awaitScrape()
	}
}

// job is the label of the pod's series.
const job = `job="` + name + `"`

// awaitScrape waits until the present pod has been scraped.
func (t *test) awaitScrape() { t.check(t.prometheus.AwaitScrape(t.ctx, job)) }

// dashboardExpressions wants a result of every expression that Grafana would ask.
func dashboardExpressions(t *test) {
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	t.check(json.Unmarshal([]byte(get[corev1.ConfigMap](t, "configmap", name+"-dashboard").Data["dashboard.json"]), &dashboard))
	t.traffic()
	variables := strings.NewReplacer("$__rate_interval", "1m", "$namespace", name)
	expressions := 0
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expressions++
			expr := variables.Replace(target.Expr)
			if series, err := t.prometheus.Query(t.ctx, expr); err != nil || len(series) == 0 {
				t.errorf("panel %q: no data: %s: %v", panel.Title, expr, err)
			}
		}
	}
	if expressions == 0 {
		t.errorf("the dashboard has no expressions")
	}
	t.report("%d panels, %d expressions", len(dashboard.Panels), expressions)
}

// raises makes an alert a criterion, one that takes a tailnet; those that don't are TestAlertsOfRealPrograms'. It is not even pending
// before the fault.
func raises(alert string, fault func(*test)) func(*test) {
	return func(t *test) {
		t.awaitScrape()
		alerts := fmt.Sprintf(`ALERTS{alertname="AnthropicProxy%s"`, alert)
		if err := t.prometheus.Await(t.ctx, "absent("+alerts+"})"); err != nil {
			t.fatalf("it is pending or fires without the fault: %w", err)
		}
		start := time.Now()
		fault(t)
		t.check(t.prometheus.Await(t.ctx, alerts+`, alertstate="firing"}`))
		t.report("fires %.1f s after the fault began", time.Since(start).Seconds())
	}
}

// freeze stops the daemon until the end.
func freeze(t *test) {
	daemon := t.process(t.awaitReady(), "tailscaled", "tailscaled").PID
	t.cleanup(func() { t.check(syscall.Kill(daemon, syscall.SIGCONT)) })
	t.check(syscall.Kill(daemon, syscall.SIGSTOP))
}

// keyEnds shortens the life of the node's key at the control server.
func keyEnds(t *test) { t.check(t.open.Control.SetMemberExpiry(name, time.Now().Add(3*24*time.Hour))) }
