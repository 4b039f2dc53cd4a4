package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// kube runs kubectl against the cluster.
type kube struct{ config string }

func (k *kube) command(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "kubectl", append([]string{"--kubeconfig", k.config}, args...)...)
}

// run returns what kubectl wrote, to stdout and stderr.
func (k *kube) run(ctx context.Context, args ...string) (string, error) {
	out, err := k.command(ctx, args...).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), errors.Join(err, ctx.Err()), strings.TrimSpace(string(out)))
	}
	return string(out), err
}

func (k *kube) inNamespace(ctx context.Context, args ...string) (string, error) {
	return k.run(ctx, append([]string{"-n", name}, args...)...)
}

// json decodes what kubectl writes to stdout.
func (k *kube) json(ctx context.Context, into any, args ...string) error {
	var stderr bytes.Buffer
	cmd := k.command(ctx, append(args, "-o", "json")...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return json.Unmarshal(out, into)
}

// pod is a pod of the Deployment as the cluster knows it.
type pod struct{ corev1.Pod }

// status returns the state of the container `proxy` or `tailscaled`.
func (p *pod) status(container string) corev1.ContainerStatus {
	for _, s := range append(p.Status.InitContainerStatuses, p.Status.ContainerStatuses...) {
		if s.Name == container {
			return s
		}
	}
	return corev1.ContainerStatus{}
}

func (p *pod) ready() bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil
		}
	}
	return false
}

// url is the way past the tailnet: the pod's own address in the cluster.
func (p *pod) url(path string) string { return "http://" + p.Status.PodIP + ":8080" + path }

// own is the way to the proxy's own endpoints, as probes and scrapes take it.
func (p *pod) own(path string) string { return "http://" + p.Status.PodIP + ":8081" + path }

// pods returns the Deployment's pods, those that end included.
func (k *kube) pods(ctx context.Context) ([]pod, error) {
	var list struct{ Items []pod }
	err := k.json(ctx, &list, "-n", name, "get", "pods", "-l", "app.kubernetes.io/name="+name)
	return list.Items, err
}

// pod returns the only pod that is not ending.
func (k *kube) pod(ctx context.Context) (*pod, error) {
	all, err := k.pods(ctx)
	if err != nil {
		return nil, err
	}
	var alive []pod
	for _, p := range all {
		if p.DeletionTimestamp == nil {
			alive = append(alive, p)
		}
	}
	if len(alive) != 1 {
		return nil, fmt.Errorf("the Deployment has %d pods, not one", len(alive))
	}
	return &alive[0], nil
}

// await polls until ok is true of the pod. It keeps the last state in its error.
func (k *kube) await(ctx context.Context, what string, ok func(*pod) bool) (*pod, error) {
	var last string
	for {
		p, err := k.pod(ctx)
		if err == nil && ok(p) {
			return p, nil
		}
		if err != nil {
			last = err.Error()
		} else {
			last = fmt.Sprintf("proxy %+v, tailscaled %+v", p.status("proxy").State, p.status("tailscaled").State)
		}
		if !pause(ctx, 200*time.Millisecond) {
			return nil, fmt.Errorf("waiting for %s: %w; last: %s", what, ctx.Err(), last)
		}
	}
}

func (k *kube) awaitReady(ctx context.Context) (*pod, error) {
	return k.await(ctx, "a Ready pod", (*pod).ready)
}

// awaitGone returns when no pod of that name is left.
func (k *kube) awaitGone(ctx context.Context, podName string) error {
	_, err := k.inNamespace(ctx, "wait", "--for=delete", "pod/"+podName, "--timeout=60s")
	if err != nil && strings.Contains(err.Error(), "not found") {
		return nil
	}
	return err
}

// logs returns a container's log; of its previous run if it was restarted.
func (k *kube) logs(ctx context.Context, p *pod, container string, previous bool) (string, error) {
	return k.inNamespace(ctx, "logs", p.Name, "-c", container, fmt.Sprintf("--previous=%v", previous))
}

// awaitLog polls until the container's log holds all texts in one line.
func (k *kube) awaitLog(ctx context.Context, p *pod, container string, texts ...string) (line string, err error) {
	for {
		log, _ := k.logs(ctx, p, container, false) // the container may not have started
		if line, ok := findLine(log, texts...); ok {
			return line, nil
		}
		if !pause(ctx, 200*time.Millisecond) {
			return "", fmt.Errorf("waiting for %q in the log of %s: %w; it is:\n%s", texts, container, ctx.Err(), tail(log))
		}
	}
}

// findLine returns the first line that holds all texts.
func findLine(log string, texts ...string) (string, bool) {
lines:
	for line := range strings.Lines(log) {
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue lines
			}
		}
		return strings.TrimSpace(line), true
	}
	return "", false
}

// tail is the end of a log, short enough for an error.
func tail(log string) string {
	lines := strings.Split(strings.TrimSpace(log), "\n")
	return strings.Join(lines[max(0, len(lines)-10):], "\n")
}

// pause waits, and reports whether there is time left.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
