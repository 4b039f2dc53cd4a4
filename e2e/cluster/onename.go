package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/traffic"
)

// replicas is how many pods the overlay has.
const replicas = 2

// The service of the overlay one-name. Its name is that of the base's node, which the test's control server never forgets: so the
// laptop goes by its address.
const (
	serviceAddr = "100.99.0.1"
	serviceURL  = "http://" + serviceAddr + ":8080"
)

// oneName deploys k8s/overlays/one-name into an empty namespace.
func oneName(ctx context.Context, w *world) (string, error) {
	w.service = w.tailnet.Control.Offer(name, netip.MustParseAddr(serviceAddr))
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
	o.oneName, o.monitoring = true, false
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
	if err := w.awaitHosts(ctx); err != nil {
		return "", err
	}
	hosts := time.Since(start)
	for i := range replicas {
		if err := w.askReplica(ctx, i); err != nil {
			return "", err
		}
	}
	if _, err := ask(ctx, w.client, serviceURL, plainBody); err != nil {
		return "", fmt.Errorf("by the service's address: %w", err)
	}
	return fmt.Sprintf("both Ready after %.1f s, and hosts of the service after %.1f s", ready.Seconds(), hosts.Seconds()), nil
}

// awaitHosts waits until both pods are hosts of the service.
func (w *world) awaitHosts(ctx context.Context) error {
	for {
		hosts := w.service.Hosts()
		if len(hosts) == replicas && w.service.Host() != "" {
			return nil
		}
		if !pause(ctx, 100*time.Millisecond) {
			return fmt.Errorf("the hosts of the service are %v: %w", hosts, ctx.Err())
		}
	}
}

// serviceIdentity looks for the laptop in the log of the pod that serves.
func serviceIdentity(ctx context.Context, w *world) (string, error) {
	p, err := w.replicaPod(ctx, w.service.Host())
	if err != nil {
		return "", err
	}
	const path = "/v1/messages/through-the-service"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, serviceURL+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := w.client.Do(req)
	if err != nil {
		return "", err
	}
	resp.Body.Close()
	_, err = w.kube.awaitLog(ctx, p, "proxy", path, `"tailnet_node":"laptop`)
	return "", err
}

// otherUser is a process of another user in the pod, such as a container beside ours: it reaches the PROXY listener, and may
// claim nothing.
func otherUser(ctx context.Context, w *world) (string, error) {
	p, err := w.replicaPod(ctx, w.service.Host())
	if err != nil {
		return "", err
	}
	pid, err := process(p, "proxy", name)
	if err != nil {
		return "", err
	}
	alias, err := w.laptop.IP(ctx)
	if err != nil {
		return "", err
	}
	forged := fmt.Sprintf("PROXY TCP4 %s 100.64.0.1 41000 8082\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", alias)
	attack := exec.CommandContext(ctx, "nsenter", "--net=/proc/"+strconv.Itoa(pid)+"/ns/net", "bash", "-c", "exec 3<>/dev/tcp/127.0.0.2/8082; printf %s \"$0\" >&3; cat <&3", forged)
	if answer, _ := attack.CombinedOutput(); strings.Contains(string(answer), "HTTP/") { // else it is reset
		return "", fmt.Errorf("a forged identity is answered: %s", answer)
	}
	_, err = w.kube.awaitLog(ctx, p, "proxy", "it is not tailscaled's: it belongs to user 0, tailscaled's socket to user 65533")
	return "", err
}

// rolledOut replaces the pods as an update does, while the laptop sends 50 requests a second. The node keys are on the pods'
// volumes, so the control server must not see new nodes.
func rolledOut(ctx context.Context, w *world) (string, error) {
	members := len(w.tailnet.Control.Members())
	l := traffic.New(w.client, serviceURL)
	sending, stop := context.WithCancel(ctx)
	defer stop()
	l.Send(sending)
	start := time.Now()
	if _, err := w.kube.inNamespace(ctx, "rollout", "restart", "statefulset/"+replica); err != nil {
		return "", err
	}
	if _, err := w.kube.inNamespace(ctx, "rollout", "status", "statefulset/"+replica, "--timeout=200s"); err != nil {
		return "", err
	}
	took := time.Since(start)
	stop()
	err := l.End()
	if err == nil && l.Messages() < 500 {
		err = errors.New("want 500 messages at least")
	}
	err = errors.Join(err, w.awaitHosts(ctx))
	for i := range replicas {
		err = errors.Join(err, w.askReplica(ctx, i))
	}
	if now := len(w.tailnet.Control.Members()); now != members {
		err = errors.Join(err, fmt.Errorf("they are other nodes: %d, then %d", members, now))
	}
	return fmt.Sprintf("%v, in %.0f s", l, took.Seconds()), err
}

// hostKilled ends the daemon of the pod that serves: its sidecar restarts alone, with the state that it had.
func hostKilled(ctx context.Context, w *world) (string, error) {
	return w.hostEnds(ctx, "tailscaled", syscall.SIGKILL)
}

// hostStopped ends the sidecar of the pod that serves in an orderly way: it withdraws the service, in the state that it keeps.
func hostStopped(ctx context.Context, w *world) (string, error) {
	return w.hostEnds(ctx, "containerboot", syscall.SIGTERM)
}

// hostEnds ends a program of the serving pod's sidecar, and measures how long it takes until that is a host again.
func (w *world) hostEnds(ctx context.Context, program string, sig syscall.Signal) (string, error) {
	host := w.service.Host()
	before, err := w.replicaPod(ctx, host)
	if err != nil {
		return "", err
	}
	pid, err := process(before, "tailscaled", program)
	if err != nil {
		return "", err
	}
	start := time.Now()
	if err := syscall.Kill(pid, sig); err != nil {
		return "", err
	}
	for now := before; now.status("tailscaled").RestartCount == before.status("tailscaled").RestartCount || !now.ready(); {
		if !pause(ctx, 100*time.Millisecond) {
			return "", fmt.Errorf("the sidecar of %s does not restart: %w", host, ctx.Err())
		}
		if now, err = w.replicaPod(ctx, host); err != nil {
			return "", err
		}
	}
	if err := w.awaitHosts(ctx); err != nil {
		return "", err
	}
	hosts := time.Since(start)
	err = w.awaitService(ctx)
	return fmt.Sprintf("%s is a host again after %.1f s, and requests flow after %.1f s", host, hosts.Seconds(), time.Since(start).Seconds()), err
}

// awaitService waits until a request to the service is answered.
func (w *world) awaitService(ctx context.Context) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 10*time.Second)
		_, err := ask(attempt, w.client, serviceURL, plainBody)
		cancel()
		if err == nil {
			return nil
		}
		if !pause(ctx, 100*time.Millisecond) {
			return fmt.Errorf("no request is answered: %w", err)
		}
	}
}

// replicaPod returns a pod by its name.
func (w *world) replicaPod(ctx context.Context, podName string) (*pod, error) {
	var p pod
	err := w.kube.json(ctx, &p, "-n", name, "get", "pod", podName)
	return &p, err
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
		p, err := w.replicaPod(ctx, podName)
		if err == nil && p.ready() {
			return tailnetURL(ctx, p, podName)
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
	w.client.CloseIdleConnections() // to the pod's predecessor
	if _, err := ask(ctx, w.client, base, plainBody); err != nil {
		return fmt.Errorf("%s-%d: %w", replica, i, err)
	}
	return nil
}

// oneNameDeleted does not wait for the drains, of which enough has been seen.
func oneNameDeleted(ctx context.Context, w *world) (string, error) {
	if w.service == nil {
		return "", errors.New("it was not deployed")
	}
	w.service.Close()
	if _, err := w.kube.inNamespace(ctx, "delete", "statefulset", replica, "--cascade=orphan"); err != nil {
		return "", err
	}
	if _, err := w.kube.inNamespace(ctx, "delete", "pods", "--all", "--force", "--grace-period=0"); err != nil {
		return "", err
	}
	measured, err := namespaceDeleted(ctx, w)
	for i := range replicas {
		_, volumeErr := w.kube.run(ctx, "delete", "persistentvolume", fmt.Sprintf("%s-%d", replica, i))
		err = errors.Join(err, volumeErr)
	}
	return measured, err
}
