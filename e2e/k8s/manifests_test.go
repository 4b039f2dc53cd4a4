package k8s

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	kyaml "sigs.k8s.io/kustomize/kyaml/yaml"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A fact is what the contract asks of an object. Its path begins with the object's kind, or with a part that has a name of its
// own: the pod, or its container proxy or sidecar. What is there has to be want, which is YAML; null is nothing.
type fact struct{ path, want string }

const (
	// selector chooses the pods. It has no version, as it can never be changed.
	selector = "{app.kubernetes.io/component: proxy, app.kubernetes.io/name: anthropic-oauth-proxy}"

	// unprivileged is for a container with one of the two uids: or else the proxy could reconfigure tailscaled.
	unprivileged = "{allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, readOnlyRootFilesystem: true, " +
		"runAsUser: UID, runAsGroup: UID}"

	config = "{name: config, configMap: {name: anthropic-oauth-proxy}}"
	socket = "{name: tailscale-socket, emptyDir: {medium: Memory, sizeLimit: 1Mi}}"
)

// common are the facts of both folders with pods. The ports, the socket and the drain are also in the ConfigMap: see
// TestConfigMapIsDefaults.
var common = []fact{
	{"Namespace metadata name", name},
	{"Namespace metadata labels pod-security.kubernetes.io/enforce", "restricted"}, // see TestPodSecurity
	{"ServiceAccount metadata name", name},
	{"ServiceAccount automountServiceAccountToken", "false"},
	{"pod spec serviceAccountName", name},
	{"pod spec automountServiceAccountToken", "false"},
	{"pod spec enableServiceLinks", "false"},
	{"pod spec containers 1", "null"},
	{"pod spec initContainers 1", "null"},
	{"pod metadata labels app.kubernetes.io/component", "proxy"}, // as the selectors have it
	{"pod metadata labels app.kubernetes.io/name", name},
	{"pod metadata labels app.kubernetes.io/version", "VERSION"},

	// A native sidecar starts before the proxy and outlives it. A startup probe on it would keep the proxy from ever naming a
	// login failure.
	{"sidecar restartPolicy", "Always"},
	{"sidecar startupProbe", "null"},
	{"sidecar livenessProbe", "null"},

	{"sidecar image", "ghcr.io/tailscale/tailscale:TAILSCALE"},
	{"proxy image", "anthropic-oauth-proxy:VERSION"},
	{"proxy imagePullPolicy", "IfNotPresent"}, // `nix run .#load` puts it on the node
	{"proxy ports", "[{name: health, containerPort: 8081}, {name: http, containerPort: 8080}]"},
	{"proxy readinessProbe httpGet", "{port: health, path: /health}"},
	{"proxy livenessProbe httpGet", "{port: health, path: /livez}"},
	// The proxy exits by itself after 1+2+4+8+16 s and names the error. Kubelet counts a startup probe's failures across restarts:
	// the probe has to outlast many of them, and yet to see soon that all is well.
	{"proxy startupProbe", "{httpGet: {port: health, path: /health}, periodSeconds: 1, failureThreshold: 86400}"},
	{"proxy securityContext", strings.ReplaceAll(unprivileged, "UID", "65532")},
	{"sidecar securityContext", strings.ReplaceAll(unprivileged, "UID", "65533")},

	// As in RUNBOOK.md. Of the memory Go gets 75 and 80 %: the rest is for what the kernel counts, and Go does not. CPUs are whole
	// ones, rounded up: by itself Go takes no fewer than two.
	{"proxy resources", "{requests: {cpu: 50m, memory: 32Mi}, limits: {cpu: 500m, memory: 128Mi}}"},
	{"proxy env", `[{name: GOMAXPROCS, value: "1"}, {name: GOMEMLIMIT, value: 96MiB}, {name: LOG_LEVEL, value: info}]`},
	{"sidecar resources", "{requests: {cpu: 50m, memory: 64Mi}, limits: {cpu: 250m, memory: 256Mi}}"},
	{"sidecar env [name=GOMAXPROCS] value", `"1"`},
	{"sidecar env [name=GOMEMLIMIT] value", "204MiB"},

	{"sidecar env [name=TS_AUTHKEY] valueFrom", "{secretKeyRef: {name: tailscale-authkey, key: TS_AUTHKEY}}"},
	{"sidecar env [name=TS_USERSPACE] value", `"true"`},                   // or else it needs NET_ADMIN
	{"sidecar env [name=TS_KUBE_SECRET]", "{name: TS_KUBE_SECRET}"},       // unset, it would mean a Secret named tailscale
	{"sidecar env [name=TS_STATE_DIR] value", "/var/lib/tailscale/state"}, // its mode is changed: the mount's cannot be
	{"sidecar env [name=TS_SOCKET] value", "/var/run/tailscale/tailscaled.sock"},
	{"sidecar volumeMounts", "[{name: tailscale-socket, mountPath: /var/run/tailscale}, " +
		"{name: tailscale-state, mountPath: /var/lib/tailscale}]"},
	{"proxy volumeMounts", "[{name: config, mountPath: /etc/anthropic-oauth-proxy, readOnly: true}, " +
		"{name: tailscale-socket, mountPath: /var/run/tailscale, readOnly: true}]"},

	// The API's name first, and again after 2 s.
	{"pod spec dnsConfig", `{options: [{name: attempts, value: "3"}, {name: ndots, value: "1"}, {name: timeout, value: "2"}]}`},

	{"NetworkPolicy spec", "{podSelector: {matchLabels: " + selector + "}, policyTypes: [Ingress, Egress], " +
		"ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}], " +
		"ports: [{port: health, protocol: TCP}]}], egress: [{ports: [{protocol: TCP, port: 443}, {protocol: TCP, port: 80}, " +
		"{protocol: TCP, port: 53}]}, {ports: [{protocol: UDP}]}]}"},
}

var folders = []struct {
	path  string
	kinds string // of its objects
	facts []fact
}{
	// One pod at a time, since a second node of the same name is renamed. Its key is nowhere but in memory.
	{onePod, "ConfigMap Deployment Namespace NetworkPolicy ServiceAccount", slices.Concat(common, []fact{
		{"Deployment metadata name", name},
		{"Deployment spec replicas", "1"},
		{"Deployment spec strategy", "{type: Recreate}"},
		{"Deployment spec selector matchLabels", selector},
		{"pod spec terminationGracePeriodSeconds", "30"},
		{"pod spec volumes", "[" + config + ", " + socket + ", {name: tailscale-state, emptyDir: {sizeLimit: 128Mi}}]"},
		{"proxy lifecycle", "null"},
		{"sidecar lifecycle", "null"},
		{"sidecar env [name=TS_HOSTNAME] value", name},
		{"sidecar env [name=TS_TAILSCALED_EXTRA_ARGS] value", "'--state=mem:'"},
	})},
	// Each pod is a node that keeps its key, and a host of the service for as long as clients may come: for 20 s after its drain
	// began. For that long, too, a new pod is not yet trusted.
	{oneName, "ConfigMap Namespace NetworkPolicy PodDisruptionBudget Service ServiceAccount StatefulSet", slices.Concat(common, []fact{
		{"StatefulSet metadata name", name + "-replica"},
		{"StatefulSet spec selector matchLabels", selector},
		{"StatefulSet spec minReadySeconds", "20"},
		{"StatefulSet spec volumeClaimTemplates", "[{metadata: {name: tailscale-state}, " +
			"spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 256Mi}}}}]"},
		{"pod spec terminationGracePeriodSeconds", "50"},
		{"pod spec volumes", "[" + config + ", " + socket + "]"},
		{"pod spec securityContext fsGroup", "65533"}, // the sidecar's, which writes to the claim
		{"pod spec topologySpreadConstraints 0 labelSelector matchLabels", selector},
		{"pod spec topologySpreadConstraints 1", "null"},
		{"proxy lifecycle", "{preStop: {sleep: {seconds: 20}}}"},
		{"sidecar lifecycle", "{preStop: {exec: {command: " +
			"[tailscale, --socket=/var/run/tailscale/tailscaled.sock, serve, drain, 'svc:anthropic-oauth-proxy']}}}"},
		{"sidecar env [name=TS_HOSTNAME] valueFrom", "{fieldRef: {fieldPath: metadata.name}}"},
		{"sidecar env [name=TS_TAILSCALED_EXTRA_ARGS]", "null"},
		// Or containerboot takes the service back while it is drained.
		{"sidecar env [name=TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT] value", `"false"`},
		{"Service spec selector", selector},
		{"PodDisruptionBudget spec", "{maxUnavailable: 1, selector: {matchLabels: " + selector + "}}"},
	})},
	// Prometheus finds the pods' own port, and its series get the label job that the alerts ask for. Grafana finds the dashboard.
	{monitoring, "ConfigMap PodMonitor PrometheusRule", []fact{
		{"PodMonitor spec selector matchLabels", selector},
		{"PodMonitor spec jobLabel", "app.kubernetes.io/name"},
		{"PodMonitor spec podMetricsEndpoints", "[{port: health, path: /metrics, interval: 15s, filterRunning: true}]"},
		{"ConfigMap metadata labels grafana_dashboard", `"1"`},
	}},
}

// TestManifests has what the contract asks of the objects in each folder. VERSION is the program's, TAILSCALE its module's.
func TestManifests(t *testing.T) {
	versions := strings.NewReplacer("VERSION", proxytest.Find(t, root+"/main.go", `^const version = "(.+)"$`),
		"TAILSCALE", proxytest.Find(t, root+"/go.mod", `tailscale\.com (v\S+)`))
	for _, f := range folders {
		t.Run(path.Base(f.path), func(t *testing.T) {
			parts, kinds := map[string]*kyaml.RNode{}, []string{}
			for _, r := range render(t, f.path).Resources() {
				kind := r.GetKind()
				kinds, parts[kind] = append(kinds, kind), &r.RNode
				if pod := at(t, parts[kind], "spec", "template"); pod != nil {
					parts["pod"] = pod
					parts["proxy"] = at(t, pod, "spec", "containers", "[name=proxy]")
					parts["sidecar"] = at(t, pod, "spec", "initContainers", "[name=tailscaled]")
				}
				f.facts = append(f.facts, fact{kind + " metadata labels app.kubernetes.io/name", name},
					fact{kind + " metadata labels app.kubernetes.io/version", "VERSION"})
				if kind != "Namespace" {
					f.facts = append(f.facts, fact{kind + " metadata namespace", name})
				}
			}
			if slices.Sort(kinds); strings.Join(kinds, " ") != f.kinds {
				t.Errorf("the objects are a %v, want a %s", kinds, f.kinds)
			}
			for _, f := range f.facts {
				part, place, _ := strings.Cut(f.path, " ")
				var got, want any
				proxytest.Check(t, kyaml.Unmarshal([]byte(at(t, parts[part], strings.Fields(place)...).MustString()), &got))
				proxytest.Check(t, kyaml.Unmarshal([]byte(versions.Replace(f.want)), &want))
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", f.path, diff)
				}
			}
		})
	}
}

// at is what is in this place of a part, nil if there is nothing.
func at(t *testing.T, part *kyaml.RNode, place ...string) *kyaml.RNode {
	t.Helper()
	return proxytest.Must(part.Pipe(kyaml.Lookup(place...)))(t)
}

// TestPodSecurity is the real admission check of the level that the namespace enforces.
func TestPodSecurity(t *testing.T) {
	evaluator := proxytest.Must(policy.NewEvaluator(policy.DefaultChecks()))(t)
	level := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	for folder, kind := range map[string]string{onePod: "Deployment", oneName: "StatefulSet"} {
		pod := decode[struct {
			Spec struct{ Template corev1.PodTemplateSpec }
		}](t, folder, kind).Spec.Template
		violations := func() string {
			result := policy.AggregateCheckResults(evaluator.EvaluatePod(level, &pod.ObjectMeta, &pod.Spec))
			return result.ForbiddenDetail()
		}
		if v := violations(); v != "" {
			t.Errorf("%s violates %s: %s", folder, level, v)
		}
		pod.Spec.InitContainers[0].SecurityContext.Capabilities = nil
		if violations() == "" {
			t.Error("a pod that drops no capabilities passes")
		}
	}
}

// TestConfigMapIsDefaults: it says what the program does without a file, but for the one setting that makes a pod in a shared
// cluster safe, the bodies that fit its memory beside a thousand connections, the probes' own port, and the listener that
// tailscaled serves from. The real program reads it.
func TestConfigMapIsDefaults(t *testing.T) {
	for folder, proxyProtocol := range map[string]string{onePod: "", oneName: "127.0.0.2:8082"} {
		stated := decode[corev1.ConfigMap](t, folder, "ConfigMap").Data["config.toml"]
		want := effective(t, fmt.Sprintf(`[proxy]
			require_tailnet = true
			body_memory_mb = 24 # and a third of GOMEMLIMIT is left
			health_addr = "0.0.0.0:8081"
			proxy_protocol_addr = %q
			drain_timeout_secs = 5 # the default, for which the pod's grace period is made
		`, proxyProtocol))
		if diff := cmp.Diff(want, effective(t, stated)); diff != "" {
			t.Errorf("%s: what the program makes of it (-want +got):\n%s", folder, diff)
		}
		if diff := cmp.Diff(parse(t, want), parse(t, stated)); diff != "" {
			t.Errorf("%s: what it states, so that whoever edits it finds every key (-want +got):\n%s", folder, diff)
		}
	}
}

// effective is what `-check-config` prints for a configuration.
func effective(t *testing.T, config string) string {
	t.Helper()
	ran := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Config: config})
	if ran.Code != 0 {
		t.Fatalf("-check-config: code %d: %s", ran.Code, ran.Stderr)
	}
	return ran.Stdout
}

func parse(t *testing.T, text string) (c map[string]any) {
	t.Helper()
	proxytest.Must(toml.Decode(text, &c))(t)
	return c
}
