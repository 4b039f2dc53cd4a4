package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/prometheus"
	corev1 "k8s.io/api/core/v1"
)

// discovery answers as the Prometheus operator would have the PodMonitor of
// k8s/components/monitoring read: the running pods, with the labels that their
// series get.
type discovery struct{ kube *kube }

func (d discovery) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	pods, err := d.kube.pods(r.Context())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway) // Prometheus keeps what it has
		return
	}
	targets := []object{}
	for _, p := range pods {
		if p.Status.Phase == corev1.PodRunning && p.Status.PodIP != "" {
			targets = append(targets, object{
				"targets": []string{p.Status.PodIP + ":8081"},
				"labels":  object{"namespace": p.Namespace, "pod": p.Name, "container": "proxy", "job": p.Labels["app.kubernetes.io/name"]},
			})
		}
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(targets)
}

// monitoringApplied installs the operator's CRDs and applies the component, which
// the API server then holds against them, unknown fields included.
func monitoringApplied(ctx context.Context, w *world) (string, error) {
	if _, err := w.kube.run(ctx, "apply", "--server-side", "-f", w.crds+"/monitoring.coreos.com_podmonitors.yaml",
		"-f", w.crds+"/monitoring.coreos.com_prometheusrules.yaml"); err != nil {
		return "", err
	}
	if _, err := w.kube.run(ctx, "wait", "--for=condition=Established", "--timeout=30s", "crd/podmonitors.monitoring.coreos.com", "crd/prometheusrules.monitoring.coreos.com"); err != nil {
		return "", err
	}
	w.overlay.monitoring = true
	dir, err := w.overlay.write(w.dir)
	if err != nil {
		return "", err
	}
	said, err := w.kube.run(ctx, "apply", "--validate=strict", "-k", dir)
	if err != nil {
		return "", err
	}
	if line, found := findLine(said, "Warning"); found {
		return "", errors.New(line)
	}
	_, err = w.redeploy(ctx, w.overlay)
	return "", err
}

// metricsLint holds the pod's metrics against Prometheus' own rules.
func metricsLint(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	_, metrics, err := get(ctx, p.own("/metrics"))
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(metrics)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		return "", fmt.Errorf("promtool check metrics: %v\n%s", err, out)
	}
	return fmt.Sprintf("%d lines", strings.Count(metrics, "\n")), nil
}

// scraped starts Prometheus, with short times before alerts fire, and waits until it has the pod's figures and every
// recorded one.
func scraped(ctx context.Context, w *world) (string, error) {
	var rule struct {
		Spec struct{ Groups prometheus.Rules }
	}
	if err := w.kube.json(ctx, &rule, "-n", name, "get", "prometheusrule", name); err != nil {
		return "", err
	}
	records := rule.Spec.Groups.Hurry()
	w.discovery = httptest.NewServer(discovery{w.kube})
	var err error
	if w.prometheus, err = prometheus.Start(w.dir, w.discovery.URL, rule.Spec.Groups); err != nil {
		return "", err
	}
	if err := w.prometheus.Await(ctx, "up{"+job+"} == 1"); err != nil {
		return "", err
	}
	if err := w.traffic(ctx); err != nil {
		return "", err
	}
	for _, record := range records {
		if err := w.prometheus.Await(ctx, record+" >= 0"); err != nil { // NaN is not
			return "", err
		}
	}
	return fmt.Sprintf("the target is up, %d recording rules have figures", len(records)), nil
}

// traffic makes some requests, seen by at least two scrapes, so that rates exist.
func (w *world) traffic(ctx context.Context) error {
	for range 2 {
		if _, _, err := w.askTailnet(ctx, plainBody); err != nil {
			return err
		}
		if err := w.prometheus.AwaitScrape(ctx, job); err != nil {
			return err
		}
	}
	return nil
}

// job is the label of the pod's series.
const job = `job="` + name + `"`

// dashboardExpressions wants a result of every expression that Grafana would ask.
func dashboardExpressions(ctx context.Context, w *world) (string, error) {
	var configMap struct{ Data map[string]string }
	if err := w.kube.json(ctx, &configMap, "-n", name, "get", "configmap", name+"-dashboard"); err != nil {
		return "", err
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal([]byte(configMap.Data["dashboard.json"]), &dashboard); err != nil {
		return "", err
	}
	if err := w.traffic(ctx); err != nil {
		return "", err
	}
	variables := strings.NewReplacer("$__rate_interval", "1m", "$namespace", name)
	expressions := 0
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			expr := variables.Replace(target.Expr)
			n, _, err := w.prometheus.Query(ctx, expr)
			if err != nil {
				return "", err
			}
			if n == 0 {
				return "", fmt.Errorf("panel %q: no data: %s", panel.Title, expr)
			}
			expressions++
		}
	}
	if expressions == 0 {
		return "", errors.New("the dashboard has no expressions")
	}
	return fmt.Sprintf("%d panels, %d expressions", len(dashboard.Panels), expressions), nil
}

// raises waits until an alert is not even pending, makes a fault, and waits until
// it fires.
func (w *world) raises(ctx context.Context, alert string, fault func() error) (string, error) {
	if err := w.prometheus.AwaitScrape(ctx, job); err != nil { // of the present pod
		return "", err
	}
	name := "AnthropicProxy" + alert
	firing := fmt.Sprintf(`ALERTS{alertname=%q, alertstate="firing"}`, name)
	if err := w.prometheus.Await(ctx, fmt.Sprintf(`absent(ALERTS{alertname=%q})`, name)); err != nil {
		return "", fmt.Errorf("it is pending or fires without the fault: %w", err)
	}
	start := time.Now()
	if err := fault(); err != nil {
		return "", err
	}
	err := w.prometheus.Await(ctx, firing)
	return fmt.Sprintf("fires %.1f s after the fault began", time.Since(start).Seconds()), err
}

// tailnetAlert freezes the daemon.
func tailnetAlert(ctx context.Context, w *world) (measured string, err error) {
	p, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	pid, err := process(p, "tailscaled", "tailscaled")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, syscall.Kill(pid, syscall.SIGCONT)) }()
	return w.raises(ctx, "TailnetDisconnected", func() error { return syscall.Kill(pid, syscall.SIGSTOP) })
}

// errorsAlert lets requests go where nobody listens.
func errorsAlert(ctx context.Context, w *world) (string, error) {
	gone, err := fakeanthropic.StartAt(net.JoinHostPort(w.host, "0"), fakeanthropic.HTTP2, nil)
	if err != nil {
		return "", err
	}
	if err := gone.Close(); err != nil {
		return "", err
	}
	o := w.overlay
	o.upstream = gone.URL
	if _, err := w.redeploy(ctx, o); err != nil {
		return "", err
	}
	measured, err := w.failing(ctx)
	return measured, w.healed(ctx, err)
}

func (w *world) failing(ctx context.Context) (string, error) {
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	if err := w.prometheus.AwaitScrape(ctx, job); err != nil { // the zeros, from which a rate begins
		return "", err
	}
	return w.raises(ctx, "UpstreamErrors", func() error {
		for range 60 { // 0.2 a second over five minutes
			resp, err := post(ctx, w.client, base, plainBody)
			if err != nil {
				return err
			}
			resp.Body.Close()
			if resp.StatusCode != http.StatusBadGateway {
				return fmt.Errorf("status %d, not 502", resp.StatusCode)
			}
		}
		return nil
	})
}

// slowAlert has one answer among a few that takes longer than the alert allows.
func slowAlert(ctx context.Context, w *world) (string, error) {
	if err := w.traffic(ctx); err != nil {
		return "", err
	}
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	w.upstream.Handle(fakeanthropic.API{Deltas: 320, Interval: 100 * time.Millisecond})
	defer w.upstream.Handle(nil)
	return w.raises(ctx, "Slow", func() error {
		_, err := ask(ctx, w.client, base, streamedBody)
		return err
	})
}

// keyAlert shortens the life of the node's key at the control server.
func keyAlert(ctx context.Context, w *world) (string, error) {
	return w.raises(ctx, "KeyExpires", func() error {
		return w.tailnet.Control.SetMemberExpiry(name, time.Now().Add(3*24*time.Hour))
	})
}

// queueAlert has more streams than places.
func queueAlert(ctx context.Context, w *world) (string, error) {
	if _, err := w.redeploy(ctx, w.overlay.with("max_connections = 1000", "max_connections = 1")); err != nil {
		return "", err
	}
	measured, err := w.queued(ctx)
	return measured, w.healed(ctx, err)
}

func (w *world) queued(ctx context.Context) (string, error) {
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	streams, end := context.WithCancel(ctx)
	defer end()
	defer w.upstream.Handle(nil)
	if _, err := w.openStream(streams, base, fakeanthropic.API{Deltas: 1e5, Interval: 100 * time.Millisecond}); err != nil {
		return "", err
	}
	return w.raises(ctx, "Queue", func() error {
		go ask(streams, w.client, base, plainBody) // it waits until the end
		return nil
	})
}

// scrapeAlert takes the pod away.
func scrapeAlert(ctx context.Context, w *world) (string, error) {
	measured, err := w.raises(ctx, "ScrapeMissing", func() error {
		_, err := w.kube.inNamespace(ctx, "scale", "deployment/"+name, "--replicas=0")
		return err
	})
	if _, scaleErr := w.kube.inNamespace(ctx, "scale", "deployment/"+name, "--replicas=1"); scaleErr != nil {
		return "", errors.Join(err, scaleErr)
	}
	_, readyErr := w.kube.awaitReady(ctx)
	return measured, errors.Join(err, readyErr)
}
