// Command cluster is the acceptance test of k8s/ on a real cluster: it deploys
// the manifests as the runbook says, from a namespace that is not there yet, and
// then holds each of their promises against what kubelet, containerd and
// containerboot really do. It ends with "N passed, N failed" and exit status 1
// if anything failed.
//
//	go -C e2e run ./cluster -kubeconfig ~/.kube/config \
//	    -proxy-image anthropic-oauth-proxy:0.1.0 -sidecar-image ghcr.io/tailscale/tailscale:v1.102.5 \
//	    -crds prometheus-operator/example/prometheus-operator-crd
//
// The cluster must be a throw-away one that has both images, and this program
// has to run on its only node, or at least at an address (-host) that pods
// reach: the control server, the DERP relay, the second tailnet node and the
// fake upstream are in this process or its children. Killing a container's
// process needs that node's /proc. Needs kubectl, prometheus and
// promtool in PATH.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/tailnet"
)

// options is the command line.
type options struct {
	kubeconfig   string
	host         string
	manifests    string
	proxyImage   string
	sidecarImage string
	crds         string
	only         string
	keep         bool
	prepare      bool
}

func main() {
	var o options
	flag.StringVar(&o.kubeconfig, "kubeconfig", os.Getenv("KUBECONFIG"), "the cluster")
	flag.StringVar(&o.host, "host", "10.254.0.1", "IPv4 `address` of this machine that pods reach")
	flag.StringVar(&o.manifests, "manifests", "../k8s", "`folder` with the manifests, from e2e")
	flag.StringVar(&o.proxyImage, "proxy-image", "", "`reference` of the proxy's image, on the node already")
	flag.StringVar(&o.sidecarImage, "sidecar-image", "", "`reference` of the sidecar's image, on the node already")
	flag.StringVar(&o.crds, "crds", "", "`folder` with the Prometheus operator's CRDs (its example/prometheus-operator-crd)")
	flag.BoolVar(&o.prepare, "prepare", false, "only build what a cluster without a network can't: the tailnet's programs")
	flag.StringVar(&o.only, "run", "", "hold only the criteria that match this `regexp`, and the first, on which all others rely")
	flag.BoolVar(&o.keep, "keep", false, "leave everything in the cluster at the end, to look at it")
	flag.Parse()
	if flag.NArg() > 0 || !o.prepare && !o.complete() {
		fmt.Fprintln(flag.CommandLine.Output(), "cluster: -kubeconfig, -proxy-image, -sidecar-image and -crds are needed")
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if o.prepare {
		if _, err := tailnet.Build(ctx, os.Stderr); err != nil {
			fmt.Fprintln(os.Stderr, "cluster:", err)
			os.Exit(1)
		}
		return
	}
	failed, err := run(ctx, o, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
	}
	if err != nil || failed > 0 {
		os.Exit(1)
	}
}

func (o options) complete() bool {
	return o.kubeconfig != "" && o.proxyImage != "" && o.sidecarImage != "" && o.crds != ""
}

// run holds all criteria against the cluster and returns how many failed. An
// error means that the test itself could not be set up or taken down.
func run(ctx context.Context, o options, out io.Writer) (failed int, err error) {
	only, err := regexp.Compile(o.only)
	if err != nil {
		return 0, fmt.Errorf("-run: %w", err)
	}
	passed := 0
	w := &world{options: o}
	_, err = w.try(ctx, func(t *test) {
		t.setUp()
		for i, c := range criteria {
			if ctx.Err() != nil || i > 0 && !only.MatchString(c.name) {
				continue
			}
			if t.holds(c, out) {
				passed++
			} else {
				failed++
			}
		}
		fmt.Fprintf(out, "%d passed, %d failed\n", passed, failed)
	})
	return failed, err
}

// patience bounds every criterion, with slack for slow machines.
const patience = 4 * time.Minute

// holds proves a criterion and tells about it.
func (t *test) holds(c criterion, out io.Writer) bool {
	ctx, cancel := context.WithTimeout(t.ctx, patience)
	defer cancel()
	start := time.Now()
	measured, err := t.try(ctx, c.prove)
	t.upstream.Handle(nil)
	verdict, lines := "PASS", measured
	if err != nil {
		verdict, lines = "FAIL", fmt.Sprintf("%v\n%s\nalone: %s", err, measured, c.alone())
	}
	fmt.Fprintf(out, "%s  %s (%v)\n", verdict, c.name, time.Since(start).Round(100*time.Millisecond))
	for line := range strings.Lines(strings.TrimSpace(lines)) {
		fmt.Fprintf(out, "      %s\n", strings.TrimRight(line, "\n"))
	}
	return err == nil
}

// criterion is one promise: prove fails if it does not hold. Each may rely on a pod that is Ready, and leaves one behind, with
// the upstream's own answers.
type criterion struct {
	name  string
	prove func(*test)
}

// alone is the command that holds it by itself, behind those that it relies on.
func (c criterion) alone() string {
	pattern := "^" + strings.ReplaceAll(regexp.QuoteMeta(c.name), "'", ".") + "$"
	for group, basis := range map[string]string{
		"monitoring: ": "|^monitoring: (.*CRDs|Prometheus scrapes)",
		"one-name: ":   "|^the namespace is deleted$|^one-name: (two pods|.*deleted)",
		"an upgrade ":  "|^the namespace is deleted",
	} {
		if strings.HasPrefix(c.name, group) {
			pattern += basis
		}
	}
	return ".ci/cluster '" + pattern + "'"
}

// criteria are in the order of a deployment's life.
var criteria = []criterion{
	{"from nothing to Ready as in the runbook, without a warning", deployment},
	{"server-side dry run and diff are clean", clean},
	{"a plain request from another tailnet node", plainRequest},
	{"a streamed request from another tailnet node", streamedRequest},
	{"the caller's identity is in the log", identity},
	{"a caller inside the cluster is refused, but for /health and /metrics", insideCaller},
	{"the pod asks for the API's name first, and again after 2 s", resolver},
	{"-check passes in the pod", doctorPasses},
	{"-check fails at tcp when the upstream is down", doctorFails("tcp", upstreamGone)},
	{"-check fails at tls when the authority is wrong", doctorFails("tls", anotherAuthority)},
	{"a configuration edit and a restart take effect", configEdit},
	{"a broken configuration is refused with line and column", configBroken},
	{"deleting the pod: a stream that ends in time arrives complete, an endless one is cut at 5 s", podDeleted},
	{"a rollout keeps the tailnet name, and logs the old node out", rolloutKeepsName},
	{"SIGKILL of tailscaled: the sidecar restarts, the proxy stays", killed("tailscaled", "tailscaled")},
	{"SIGKILL of the proxy: the proxy restarts, the sidecar stays", killed("proxy", name)},
	{"-check fails at tailscaled when the socket is gone", doctorNoSocket},
	{"a wrong auth key: CrashLoopBackOff, named TailnetAuth", wrongAuthKey},
	{"rotating the auth key as in the runbook heals it", rotatedAuthKey},
	{"machine approval pending: named, healed by the approval alone", machineApproval},
	{"load over the tailnet: what the sidecar's limits allow", tailnetLoad},
	{"256Mi: 50 uploads of 5 MB at once over the tailnet, for a minute", tailnetUploads},
	{"128Mi: a thousand concurrent streams", thousandStreams},
	{"128Mi: more 10 MiB uploads than the body budget holds", manyUploads},
	{"monitoring: the operator's CRDs accept the component", monitoringApplied},
	{"monitoring: promtool finds nothing in /metrics", metricsLint},
	{"monitoring: Prometheus scrapes the pod and records the quantiles", scraped},
	{"monitoring: every expression of the dashboard has data", dashboardExpressions},
	{"monitoring: TailnetDisconnected, with a daemon that hangs", raises("TailnetDisconnected", nothing, freeze)},
	{"monitoring: KeyExpires, with a key that ends in three days", raises("KeyExpires", nothing, keyEnds)},
	{"monitoring: UpstreamErrors, with an upstream that refuses", raises("UpstreamErrors", withoutUpstream, failingRequests)},
	{"monitoring: Slow, with an answer of 32 s", raises("Slow", (*test).traffic, slowAnswer)},
	{"monitoring: Queue, with one place and two requests", raises("Queue", full, waitingRequest)},
	{"monitoring: ScrapeMissing, without a pod", raises("ScrapeMissing", nothing, noPod)},
	{"the node drains", nodeDrain},
	{"the namespace is deleted", namespaceDeleted},
	{"an upgrade from 0.1.0 by apply alone: the pod is replaced, nothing is orphaned", upgrade},
	{"the namespace is deleted again", namespaceDeleted},
	{"one-name: two pods host one service", oneName},
	{"one-name: the caller's identity is in the log", serviceIdentity},
	{"one-name: another user in the pod can't claim to be somebody", otherUser},
	{"one-name: SIGKILL of the serving tailscaled: its sidecar restarts, and is a host again", hostEnds("tailscaled", syscall.SIGKILL)},
	{"one-name: SIGTERM of the serving containerboot: likewise, though it has withdrawn the service", hostEnds("containerboot", syscall.SIGTERM)},
	{"one-name: an update under 50 requests/s, of which none fails: the same nodes, one by one", rolledOut},
	{"one-name: the namespace is deleted", oneNameDeleted},
}
