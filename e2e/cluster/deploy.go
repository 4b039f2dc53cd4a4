package main

import (
	"maps"
	"path/filepath"
	"time"
)

// deployment follows the runbook's section Deploy, on a cluster without the namespace.
func deployment(t *test) {
	start := t.install(t.overlay)
	p := t.awaitReady()
	t.report("Ready %.2f s after the apply", time.Since(start).Seconds())
	for _, c := range containers {
		if n := p.container(c).RestartCount; n > 0 {
			t.errorf("%s was restarted %d times", c, n)
		}
	}
}

// released has the manifests of the latest release: of 0.1.0, before this program had a tag. With each release come its own
// (k8s.tar.gz).
const released = "e2e/cluster/testdata/released/k8s"

// upgrade applies the manifests over those of the release: the pod is replaced, and nothing of before is left without an owner.
func upgrade(t *test) {
	after := t.overlay
	after.monitoring = false // an upgrade of the base alone
	before := after
	before.manifests = filepath.Join(filepath.Dir(after.manifests), released)
	t.install(before)
	old := t.awaitReady()
	start := time.Now()
	t.apply(after)
	t.awaitGone(old)
	if now := t.awaitReady(); now.Labels["app.kubernetes.io/instance"] == "" {
		t.fatalf("the new pod has the labels %v", now.Labels)
	}
	t.report("the new pod is Ready %.1f s after the apply", time.Since(start).Seconds())

	one := map[string]int{"Deployment": 1, "ConfigMap": 1, "ServiceAccount": 1, "NetworkPolicy": 1, "Pod": 1} // the Secret is the user's
	kinds := map[string]int{}
	for _, object := range get[struct{ Items []struct{ Kind string } }](t,
		"deployments,configmaps,serviceaccounts,networkpolicies,secrets,services,pods", "-l", "app.kubernetes.io/name="+name).Items {
		kinds[object.Kind]++
	}
	if !maps.Equal(kinds, one) {
		t.errorf("the objects are %v, not %v", kinds, one)
	}
}

// configEdit changes one key, applies and restarts, as the runbook says.
func configEdit(t *test) {
	o := t.overlay
	o.config = []string{"timeout_secs = 60", "timeout_secs = 61"}
	t.cleanup(t.heal)
	t.restart(o)
	t.awaitLog(t.awaitReady(), "proxy", `"configuration loaded"`, `"timeout_secs":61`)
}

// rolloutKeepsName restarts the Deployment. The test control server neither renames a second node nor forgets the first, so what
// counts is that the old daemon has told it, before its end, to log the node out.
func rolloutKeepsName(t *test) {
	log := t.follow("logs", "-f", theOnly(t).Name, "-c", "tailscaled")
	start := time.Now()
	t.heal()
	t.report("restart to Ready %.1f s, the name is still %s", time.Since(start).Seconds(), name)
	t.tailnetURL() // it checks the name
	t.find(log(), "logged out")
}
