package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// deployment follows the runbook's section Deploy, on a cluster without the namespace.
func deployment(ctx context.Context, w *world) (string, error) {
	if _, err := w.kube.run(ctx, "create", "namespace", name); err != nil {
		return "", err
	}
	if err := w.createSecret(ctx, authKey); err != nil {
		return "", err
	}
	start := time.Now()
	said, err := w.apply(ctx, w.overlay)
	if err != nil {
		return "", err
	}
	if line, found := findLine(said, "would violate"); found {
		return "", errors.New(line)
	}
	p, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	ready := time.Since(start).Round(10 * time.Millisecond)
	for _, container := range []string{"proxy", "tailscaled"} {
		if n := p.status(container).RestartCount; n > 0 {
			return "", fmt.Errorf("%s was restarted %d times", container, n)
		}
	}
	return fmt.Sprintf("apply to Ready %v", ready), nil
}

// released has the manifests of the latest release: of 0.1.0, before this program had a tag. With each release come its own (k8s.tar.gz).
const released = "e2e/cluster/testdata/released/k8s"

// upgrade applies the manifests over those of the release: the pod is replaced, and nothing of before is left without an owner.
func upgrade(ctx context.Context, w *world) (string, error) {
	after := w.overlay
	after.monitoring = false // an upgrade of the base alone
	before := after
	before.manifests = filepath.Join(filepath.Dir(after.manifests), released)
	if _, err := w.kube.run(ctx, "create", "namespace", name); err != nil {
		return "", err
	}
	if err := w.createSecret(ctx, authKey); err != nil {
		return "", err
	}
	if _, err := w.apply(ctx, before); err != nil {
		return "", err
	}
	old, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	start := time.Now()
	if _, err := w.apply(ctx, after); err != nil {
		return "", err
	}
	if err := w.kube.awaitGone(ctx, old.Name); err != nil {
		return "", err
	}
	now, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	took := time.Since(start)
	if now.Labels["app.kubernetes.io/instance"] == "" {
		return "", fmt.Errorf("the new pod has the labels %v", now.Labels)
	}
	kinds := map[string]int{}
	var all struct{ Items []struct{ Kind string } }
	if err := w.kube.json(ctx, &all, "-n", name, "get", "deployments,configmaps,serviceaccounts,networkpolicies,secrets,services,pods", "-l", "app.kubernetes.io/name="+name); err != nil {
		return "", err
	}
	for _, item := range all.Items {
		kinds[item.Kind]++
	}
	for kind, n := range kinds {
		if n != 1 {
			return "", fmt.Errorf("%d objects of kind %s: %v", n, kind, kinds)
		}
	}
	if len(kinds) != 5 { // the Secret is the user's
		return "", fmt.Errorf("the objects are %v", kinds)
	}
	return fmt.Sprintf("the new pod is Ready %.1f s after the apply", took.Seconds()), nil
}

// createSecret is the runbook's command.
func (w *world) createSecret(ctx context.Context, key string) error {
	_, err := w.kube.run(ctx, "create", "secret", "generic", "tailscale-authkey", "--namespace="+name, "--from-literal=TS_AUTHKEY="+key)
	return err
}

// clean asks the API server what an unchanged apply would change.
func clean(ctx context.Context, w *world) (string, error) {
	dir, err := w.overlay.write(w.dir)
	if err != nil {
		return "", err
	}
	said, err := w.kube.run(ctx, "apply", "--dry-run=server", "-k", dir)
	if err != nil {
		return "", err
	}
	objects := 0
	for line := range strings.Lines(said) {
		if !strings.HasSuffix(strings.TrimSpace(line), "unchanged (server dry run)") {
			return "", fmt.Errorf("the dry run says: %s", line)
		}
		objects++
	}
	diff := w.kube.command(ctx, "diff", "-k", dir)
	out, err := diff.CombinedOutput()
	if exit := new(exec.ExitError); errors.As(err, &exit) && exit.ExitCode() == 1 {
		return "", fmt.Errorf("diff -k finds a difference:\n%s", out)
	}
	return fmt.Sprintf("%d objects", objects), err
}

// nodeDrain drains the pod's node, which nothing may hinder, and lets pods back.
func nodeDrain(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	start := time.Now()
	_, err = w.kube.run(ctx, "drain", p.Spec.NodeName, "--ignore-daemonsets", "--delete-emptydir-data",
		"--pod-selector=app.kubernetes.io/name="+name, "--timeout=60s")
	took := time.Since(start)
	_, uncordonErr := w.kube.run(ctx, "uncordon", p.Spec.NodeName)
	if err := errors.Join(err, uncordonErr); err != nil {
		return "", err
	}
	if _, err := w.kube.awaitReady(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("drained in %v", took.Round(10*time.Millisecond)), nil
}

// namespaceDeleted deletes everything with the namespace.
func namespaceDeleted(ctx context.Context, w *world) (string, error) {
	start := time.Now()
	if _, err := w.kube.run(ctx, "delete", "namespace", name, "--timeout=120s"); err != nil {
		return "", err
	}
	return fmt.Sprintf("deleted in %v", time.Since(start).Round(100*time.Millisecond)), nil
}
