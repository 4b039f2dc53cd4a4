package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// replicas is how many pods the overlay has.
const replicas = 2

// scaledOut deploys k8s/overlays/scale-out into an empty namespace.
func scaledOut(ctx context.Context, w *world) (string, error) {
	if err := w.makeVolumes(ctx); err != nil {
		return "", err
	}
	if _, err := w.kube.run(ctx, "create", "namespace", name); err != nil {
		return "", err
	}
	if err := w.createSecret(ctx, authKey); err != nil {
		return "", err
	}
	o := w.overlay
	o.scaleOut, o.monitoring = true, false
	start := time.Now()
	said, err := w.apply(ctx, o)
	if err != nil {
		return "", err
	}
	if line, found := findLine(said, "would violate"); found {
		return "", errors.New(line)
	}
	for i := range replicas {
		if _, err := w.replicaURL(ctx, i); err != nil {
			return "", err
		}
	}
	ready := time.Since(start)
	for i := range replicas {
		if err := w.askReplica(ctx, i); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("both Ready after %.1f s", ready.Seconds()), nil
}

// makeVolumes offers folders of this machine as local volumes, for a cluster
// that has no storage class.
func (w *world) makeVolumes(ctx context.Context) error {
	var nodes struct {
		Items []struct {
			Metadata struct{ Labels map[string]string }
		}
	}
	if err := w.kube.json(ctx, &nodes, "get", "nodes"); err != nil {
		return err
	}
	const hostname = "kubernetes.io/hostname"
	onNode := object{"key": hostname, "operator": "In", "values": []string{nodes.Items[0].Metadata.Labels[hostname]}}
	for i := range replicas {
		dir := filepath.Join(w.dir, fmt.Sprintf("volume-%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		text, err := json.Marshal(object{
			"apiVersion": "v1",
			"kind":       "PersistentVolume",
			"metadata":   object{"name": fmt.Sprintf("%s-%d", replica, i)},
			"spec": object{
				"capacity":                      object{"storage": "256Mi"},
				"accessModes":                   []string{"ReadWriteOnce"},
				"persistentVolumeReclaimPolicy": "Retain",
				"local":                         object{"path": dir},
				"nodeAffinity":                  object{"required": object{"nodeSelectorTerms": []object{{"matchExpressions": []object{onNode}}}}},
			},
		})
		if err != nil {
			return err
		}
		file := dir + ".json"
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
		if _, err := w.kube.run(ctx, "apply", "-f", file); err != nil {
			return err
		}
	}
	return nil
}

// replicaURL waits until a pod is Ready, and returns its tailnet address. Its
// node must have the pod's name.
func (w *world) replicaURL(ctx context.Context, i int) (string, error) {
	podName := fmt.Sprintf("%s-%d", replica, i)
	for {
		var p pod
		err := w.kube.json(ctx, &p, "-n", name, "get", "pod", podName)
		if err == nil && p.ready() {
			return tailnetURL(ctx, &p, podName)
		}
		if !pause(ctx, 200*time.Millisecond) {
			return "", fmt.Errorf("waiting for %s: %w; proxy %+v, tailscaled %+v",
				podName, errors.Join(err, ctx.Err()), p.status("proxy").State, p.status("tailscaled").State)
		}
	}
}

func (w *world) askReplica(ctx context.Context, i int) error {
	base, err := w.replicaURL(ctx, i)
	if err != nil {
		return err
	}
	if _, err := ask(ctx, w.client, base, plainBody); err != nil {
		return fmt.Errorf("%s-%d: %w", replica, i, err)
	}
	return nil
}

// replicaReturns deletes the first pod. Its node key is on its volume, so the
// control server must not see a new node, nor may the address change.
func replicaReturns(ctx context.Context, w *world) (string, error) {
	before, err := w.replicaURL(ctx, 0)
	if err != nil {
		return "", err
	}
	members := len(w.tailnet.Control.Members())
	start := time.Now()
	if _, err := w.kube.inNamespace(ctx, "delete", "pod", replica+"-0"); err != nil {
		return "", err
	}
	if err := w.askReplica(ctx, 1); err != nil {
		return "", fmt.Errorf("while the other is away: %w", err)
	}
	after, err := w.replicaURL(ctx, 0)
	if err != nil {
		return "", err
	}
	ready := time.Since(start)
	if now := len(w.tailnet.Control.Members()); after != before || now != members {
		return "", fmt.Errorf("it is another node: %s, then %s; %d nodes, then %d", before, after, members, now)
	}
	if err := w.askReplica(ctx, 0); err != nil {
		return "", err
	}
	return fmt.Sprintf("Ready again after %.1f s", ready.Seconds()), nil
}

func scaleOutDeleted(ctx context.Context, w *world) (string, error) {
	measured, err := namespaceDeleted(ctx, w)
	for i := range replicas {
		_, volumeErr := w.kube.run(ctx, "delete", "persistentvolume", fmt.Sprintf("%s-%d", replica, i))
		err = errors.Join(err, volumeErr)
	}
	return measured, err
}
