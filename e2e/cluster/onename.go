package main

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/traffic"

	corev1 "k8s.io/api/core/v1"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// replicas are the pods of the overlay.
var replicas = []string{replica + "-0", replica + "-1"}

// The service of the overlay one-name. Its name is that of the base's node, which the test's control server never forgets: so the
// laptop goes by its address.
const serviceAddr = "100.99.0.1"

// serviceURL waits until both pods are hosts of the service, and returns its URL.
func (t *test) serviceURL() string {
	t.await("both hosts", func(t *test) {
		if hosts, routed := t.service.Hosts(); len(hosts) != len(replicas) || routed == "" {
			t.fatalf("the hosts of the service are %v", hosts)
		}
	})
	return "http://" + serviceAddr + ":8080"
}

// oneName deploys k8s/overlays/one-name into an empty namespace.
func oneName(t *test) {
	t.service = t.open.Control.Offer(t.whole.ctx, name, netip.MustParseAddr(serviceAddr))
	t.makeVolumes()
	o := t.overlay
	o.oneName, o.monitoring = true, false
	start := t.install(o)
	url := t.serviceURL()
	t.report("hosts of the service after %.1f s", time.Since(start).Seconds())
	t.askReplicas()
	t.ask(t.client, url+messages, proxytest.Message)
}

// makeVolumes offers folders of this machine to the pods.
func (t *test) makeVolumes() {
	for _, podName := range replicas {
		t.check(os.Mkdir(filepath.Join(t.dir, podName), 0o755))
	}
	node := get[corev1.NodeList](t, "nodes").Items[0].Labels[corev1.LabelHostname]
	file := filepath.Join(t.dir, "volumes.yaml")
	t.check(os.WriteFile(file, t.render("volumes.yaml", object{"Pods": replicas, "Dir": t.dir, "Node": node}), 0o644))
	t.kubectl("apply", "-f", file)
}

// askReplicas asks each pod, once it is Ready, at its tailnet address. Its node must have the pod's name.
func (t *test) askReplicas() {
	for _, podName := range replicas {
		url := t.address(t.awaitPod(named(podName), podName, (*pod).ready), podName)
		t.client.CloseIdleConnections() // to the pod's predecessor
		t.ask(t.client, url+messages, proxytest.Message)
	}
}

// serving is the pod to which clients of the service come.
func serving(t *test) *pod {
	_, host := t.service.Hosts()
	return named(host)(t)
}

// otherUser is a process of another user in the pod, such as a container beside ours: it reaches the PROXY listener, and may
// claim nothing.
func otherUser(t *test) {
	p := serving(t)
	forged := fmt.Sprintf("PROXY TCP4 %s 100.64.0.1 41000 8082\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", must(t.laptop.Self(t.ctx))(t).IP)
	attack := exec.CommandContext(t.ctx, "nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", t.process(p, "proxy", name).PID),
		"bash", "-c", `exec 3<>/dev/tcp/127.0.0.2/8082; printf %s "$0" >&3; cat <&3`, forged)
	if answer, _ := attack.CombinedOutput(); strings.Contains(string(answer), "HTTP/") { // else it is reset, which may end bash
		t.errorf("a forged identity is answered: %s", answer)
	}
	t.awaitLog(p, "proxy", "it is not tailscaled's: it belongs to user 0, tailscaled's socket to user 65533")
}

// rolledOut replaces the pods as an update does, while the laptop sends 50 requests a second. The node keys are on the pods'
// volumes, so the control server must not see new nodes.
func rolledOut(t *test) {
	members := len(t.open.Control.Members())
	requests := traffic.New(t.client, t.serviceURL())
	sending, stop := context.WithCancel(t.ctx)
	requests.Send(sending)
	start := time.Now()
	t.kubectl("rollout", "restart", "statefulset/"+replica)
	t.kubectl("rollout", "status", "statefulset/"+replica, "--timeout=200s")
	took := time.Since(start)
	stop()
	if err := requests.End(); err != nil {
		t.errorf("%w", err)
	}
	t.report("%v, in %.0f s", requests, took.Seconds())
	if requests.Messages() < 500 {
		t.errorf("%d messages, not 500 at least", requests.Messages())
	}
	t.serviceURL()
	t.askReplicas()
	if now := len(t.open.Control.Members()); now != members {
		t.errorf("they are other nodes: %d, then %d", members, now)
	}
}

// oneNameDeleted does not wait for the drains, of which enough has been seen.
func oneNameDeleted(t *test) {
	t.kubectl("delete", "statefulset", replica, "--cascade=orphan")
	t.kubectl("delete", "pods", "--all", "--force", "--grace-period=0")
	t.deleteNamespace()
	t.kubectl(append([]string{"delete", "persistentvolume"}, replicas...)...)
}
