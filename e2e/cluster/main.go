// Command cluster is the acceptance test of k8s/ on a real cluster: it deploys the manifests as the runbook says, from a
// namespace that is not there yet, and then holds each of their promises against what kubelet, containerd and
// containerboot really do. It ends with "N passed, N failed" and exit status 1 if anything failed.
//
// .ci/cluster runs it, in the lab's throw-away cluster, of which KUBECONFIG tells and which has both images: on its only
// node, as the control server, the DERP relay, the second tailnet node and the fake upstream are in this process or its
// children, and killing a container's process needs that node's /proc. Needs kubectl, prometheus and promtool in PATH.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage, in e2e: cluster PROXY-IMAGE SIDECAR-IMAGE FOLDER-OF-CRDS PATTERN")
		os.Exit(2)
	}
	only := regexp.MustCompile(os.Args[4])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	w := &world{proxyImage: os.Args[1], sidecarImage: os.Args[2], crds: os.Args[3]}
	passed, failed := 0, 0
	_, err := w.try(ctx, func(t *test) {
		t.setUp()
		for i, c := range criteria {
			switch {
			case ctx.Err() != nil || i > 0 && !only.MatchString(c.name): // all others rely on the first
			case t.holds(c):
				passed++
			default:
				failed++
			}
		}
		fmt.Printf("%d passed, %d failed\n", passed, failed)
	})
	stop()
	if err != nil { // the test itself could not be set up or taken down
		fmt.Fprintln(os.Stderr, "cluster:", err)
	}
	if err != nil || failed > 0 {
		os.Exit(1)
	}
}

// patience bounds every criterion, with slack for slow machines.
const patience = 4 * time.Minute

// holds proves a criterion and tells about it.
func (t *test) holds(c criterion) bool {
	ctx, cancel := context.WithTimeout(t.ctx, patience)
	defer cancel()
	start := time.Now()
	measured, err := t.try(ctx, c.prove)
	t.upstream.Handle(nil)
	verdict, said := "PASS", measured
	if err != nil {
		verdict, said = "FAIL", fmt.Sprintf("%v\n%s\nalone: %s", err, measured, c.alone())
	}
	fmt.Printf("%s  %s (%v)\n", verdict, c.name, time.Since(start).Round(100*time.Millisecond))
	for line := range strings.Lines(strings.TrimSpace(said)) {
		fmt.Printf("      %s\n", strings.TrimRight(line, "\n"))
	}
	return err == nil
}

// criterion is one promise: prove fails if it does not hold. Each may rely on a pod that is Ready, and leaves one behind, with
// the upstream's own answers.
type criterion struct {
	name  string
	prove func(*test)
}

// alone is the command that holds it, with its group, on which it may rely.
func (c criterion) alone() string {
	group, _, _ := strings.Cut(c.name, ": ")
	return ".ci/cluster '^" + strings.ReplaceAll(regexp.QuoteMeta(group), "'", ".") + "'"
}

// criteria are in the order of a deployment's life.
var criteria = []criterion{
	{"from nothing to Ready as in the runbook, without a warning", deployment},
	{"a plain request from another tailnet node", plainRequest},
	{"-check passes in the pod", doctorPasses},
	{"a configuration edit and a restart take effect", configEdit},
	{"deleting the pod: a stream that ends in time arrives complete, an endless one is cut at 5 s", podDeleted},
	{"a rollout keeps the tailnet name, and logs the old node out", rolloutKeepsName},
	{"SIGKILL of tailscaled: the sidecar restarts, the proxy stays", ends(theOnly, "tailscaled", "tailscaled", syscall.SIGKILL, (*test).tailnetURL)},
	{"SIGKILL of the proxy: the proxy restarts, the sidecar stays", ends(theOnly, "proxy", name, syscall.SIGKILL, (*test).tailnetURL)},
	{"a wrong auth key: CrashLoopBackOff, named TailnetAuth", wrongAuthKey},
	{"rotating the auth key as in the runbook heals it", rotatedAuthKey},
	{"load over the tailnet: what the sidecar's limits allow", tailnetLoad},
	{"256Mi: 50 uploads of 5 MB at once over the tailnet, for a minute", tailnetUploads},
	{"128Mi: a thousand concurrent streams", thousandStreams},
	{"monitoring: the operator's CRDs accept the component", monitoringApplied},
	{"monitoring: Prometheus scrapes the pod and records the quantiles", scraped},
	{"monitoring: every expression of the dashboard has data", dashboardExpressions},
	{"monitoring: TailnetDisconnected, with a daemon that hangs", raises("TailnetDisconnected", freeze)},
	{"monitoring: KeyExpires, with a key that ends in three days", raises("KeyExpires", keyEnds)},
	{"an upgrade from 0.1.0 by apply alone: the pod is replaced, nothing is orphaned", upgrade},
	{"one-name: two pods host one service", oneName},
	{"one-name: another user in the pod can't claim to be somebody", otherUser},
	// Killed, it has the state that it had; stopped in an orderly way, it has withdrawn the service in the state that it keeps.
	{"one-name: SIGKILL of the serving tailscaled: its sidecar restarts, and is a host again",
		ends(serving, "tailscaled", "tailscaled", syscall.SIGKILL, (*test).serviceURL)},
	{"one-name: SIGTERM of the serving containerboot: likewise, though it has withdrawn the service",
		ends(serving, "tailscaled", "containerboot", syscall.SIGTERM, (*test).serviceURL)},
	{"one-name: an update under 50 requests/s, of which none fails: the same nodes, one by one", rolledOut},
	{"one-name: the namespace is deleted", oneNameDeleted},
}
