package k8s

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"path"
	"slices"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	"github.com/BurntSushi/toml"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// socket is tailscaled's, as in the ConfigMap: see TestConfigMapIsDefaults.
const socket = "/var/run/tailscale/tailscaled.sock"

// TestManifests has what the contract asks of one pod and of several behind one name.
func TestManifests(t *testing.T) {
	for folder, more := range map[string]func(*testing.T, *manifests) []fact{onePod: onePodFacts, oneName: oneNameFacts} {
		t.Run(path.Base(folder), func(t *testing.T) {
			m := load(t, folder)
			check(t, slices.Concat(facts(t, m), more(t, m))...)
		})
	}
}

func facts(t *testing.T, m *manifests) []fact {
	version := proxytest.Find(t, root+"/main.go", `^const version = "(.+)"$`)
	proxy, sidecar := cmp.Or(m.proxy.SecurityContext, &corev1.SecurityContext{}), cmp.Or(m.sidecar.SecurityContext, &corev1.SecurityContext{})
	startup := cmp.Or(m.proxy.StartupProbe, &corev1.Probe{})
	ingress, egress := only(t, m.networkPolicy.Spec.Ingress), m.networkPolicy.Spec.Egress
	afterDrain := *cmp.Or(m.pod.Spec.TerminationGracePeriodSeconds, new(int64)) - m.settings["drain_timeout_secs"].(int64) - preStop(m)
	all := []fact{
		{"namespace", m.namespace.Name, name},
		{"service account", m.pod.Spec.ServiceAccountName, m.serviceAccount.Name},
		{"containers", []string{m.proxy.Name, m.sidecar.Name}, []string{"proxy", "tailscaled"}},
		{"proxy's image", m.proxy.Image, name + ":" + version},
		{"proxy's image is asked for", m.proxy.ImagePullPolicy, "IfNotPresent"}, // `nix run .#load` puts it on the node
		{"sidecar's image", m.sidecar.Image, "ghcr.io/tailscale/tailscale:" + proxytest.Find(t, root+"/go.mod", `tailscale\.com (v\S+)`)},

		{"selector matches the pod", labels.SelectorFromSet(m.selector).Matches(labels.Set(m.pod.Labels)), true},
		{"selector is empty", len(m.selector) == 0, false},
		{"version in the selector, which can never be changed", m.selector["app.kubernetes.io/version"], ""},
		{"NetworkPolicy's selector", m.networkPolicy.Spec.PodSelector.MatchLabels, m.selector},

		// A native sidecar starts before the proxy and outlives it. A startup probe on it would keep the proxy from ever naming a
		// login failure. kubelet kills what outlives the grace period: the proxy's drain, then the sidecar's logout, for which
		// tailscaled takes up to 5 s.
		{"sidecar's restart policy", m.sidecar.RestartPolicy, "Always"},
		{"sidecar's startup probe", m.sidecar.StartupProbe, nil},
		{"sidecar's liveness probe", m.sidecar.LivenessProbe, nil},
		{"7 to 30 s from the drain to the kill", afterDrain >= 7 && afterDrain <= 30, true},

		{"ports", ports(m), map[string]int{"http": 8080, "health": 8081}}, // as in the ConfigMap: see TestConfigMapIsDefaults
		{"readiness", asks(m.proxy.ReadinessProbe), "health/health"},
		{"liveness", asks(m.proxy.LivenessProbe), "health/livez"},
		{"startup", asks(startup), "health/health"},
		// The proxy exits by itself after 1+2+4+8+16 s and names the error. Kubelet counts a startup probe's failures across
		// restarts: the probe has to outlast many of them.
		{"startup outlasts 100 restarts", startup.PeriodSeconds*startup.FailureThreshold > 100*31, true},
		{"startup is noticed within 2 s", startup.PeriodSeconds <= 2, true},

		{"Pod Security, as TestPodSecurity checks it", m.namespace.Labels["pod-security.kubernetes.io/enforce"], "restricted"},
		{"pod's token", m.pod.Spec.AutomountServiceAccountToken, false},
		{"account's token", m.serviceAccount.AutomountServiceAccountToken, false},
		{"service links", m.pod.Spec.EnableServiceLinks, false},
		{"read-only roots", []*bool{proxy.ReadOnlyRootFilesystem, sidecar.ReadOnlyRootFilesystem}, []bool{true, true}},
		// Or else the proxy could reconfigure tailscaled.
		{"two uids", []*int64{proxy.RunAsUser, sidecar.RunAsUser}, []int{65532, 65533}},

		// As in RUNBOOK.md. Of the memory Go gets a part: the rest is for what the kernel counts, and Go does not. CPUs are whole
		// ones, rounded up: by itself Go takes no fewer than two.
		{"proxy's resources", sizes(m.proxy), "50m | 500m | 32Mi | 128Mi"},
		{"sidecar's resources", sizes(m.sidecar), "50m | 250m | 64Mi | 256Mi"},
		{"proxy's part", []string{env(m.proxy)["GOMEMLIMIT"].Value, env(m.proxy)["GOMAXPROCS"].Value}, []string{"96MiB", "1"}},        // 75 %
		{"sidecar's part", []string{env(m.sidecar)["GOMEMLIMIT"].Value, env(m.sidecar)["GOMAXPROCS"].Value}, []string{"204MiB", "1"}}, // 80 %
		{"body_memory_mb leaves a third of GOMEMLIMIT", m.settings["body_memory_mb"].(int64) <= 96*2/3, true},

		{"LOG_LEVEL", env(m.proxy)["LOG_LEVEL"].Value, "info"},
		{"TS_AUTHKEY", env(m.sidecar)["TS_AUTHKEY"].ValueFrom, json.RawMessage(`{"secretKeyRef":{"name":"tailscale-authkey","key":"TS_AUTHKEY"}}`)},
		{"TS_SOCKET", env(m.sidecar)["TS_SOCKET"].Value, socket},
		{"TS_USERSPACE, without which NET_ADMIN is needed", env(m.sidecar)["TS_USERSPACE"].Value, "true"},
		// Unset, it would mean a Secret named tailscale.
		{"TS_KUBE_SECRET", env(m.sidecar)["TS_KUBE_SECRET"], corev1.EnvVar{Name: "TS_KUBE_SECRET"}},
		// Its folder's mode is changed, and the mount's root is not its own.
		{"TS_STATE_DIR is below the mount", path.Dir(env(m.sidecar)["TS_STATE_DIR"].Value), "/var/lib/tailscale"},
		{"sidecar's state", mount(m.sidecar, "/var/lib/tailscale"), "tailscale-state, writable"},
		{"sidecar's socket", mount(m.sidecar, path.Dir(socket)), "tailscale-socket, writable"},
		{"proxy's socket", mount(m.proxy, path.Dir(socket)), "tailscale-socket, read-only"},
		{"proxy's configuration", mount(m.proxy, "/etc/anthropic-oauth-proxy"), "config, read-only"},
		// The API's name first, and again after 2 s.
		{"resolver", m.pod.Spec.DNSConfig.Options, json.RawMessage(
			`[{"name":"attempts","value":"3"},{"name":"ndots","value":"1"},{"name":"timeout","value":"2"}]`)},
		{"mounts", len(m.proxy.VolumeMounts) + len(m.sidecar.VolumeMounts), 4},

		{"NetworkPolicy's types", m.networkPolicy.Spec.PolicyTypes, []string{"Ingress", "Egress"}},
		{"in, from", ingress.From, json.RawMessage(`[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":"monitoring"}}}]`)},
		{"in, to", ingress.Ports, json.RawMessage(`[{"protocol":"TCP","port":"health"}]`)},
		{"out, TCP", egress[0], json.RawMessage(`{"ports":[{"protocol":"TCP","port":443},{"protocol":"TCP","port":80},{"protocol":"TCP","port":53}]}`)},
		{"out, UDP", egress[1:], json.RawMessage(`[{"ports":[{"protocol":"UDP"}]}]`)},
	}
	for kind, labels := range m.labels {
		all = append(all,
			fact{kind + "'s label name", labels["app.kubernetes.io/name"], name},
			fact{kind + "'s label version", labels["app.kubernetes.io/version"], version})
	}
	for _, v := range m.pod.Spec.Volumes { // neither a secret nor a token nor the node's own disk
		harmless := v.EmptyDir != nil || v.ConfigMap != nil && v.ConfigMap.Name == m.configMap.Name
		all = append(all, fact{v.Name + " is an emptyDir or the ConfigMap", harmless, true})
	}
	return all
}

// One pod at a time, since a second node of the same name is renamed. Its key is nowhere but in memory.
func onePodFacts(_ *testing.T, m *manifests) []fact {
	return []fact{
		{"workload", m.deployment.Name, name},
		{"replicas", m.deployment.Spec.Replicas, 1},
		{"strategy", m.deployment.Spec.Strategy.Type, "Recreate"},
		{"TS_HOSTNAME", env(m.sidecar)["TS_HOSTNAME"].Value, name},
		{"TS_TAILSCALED_EXTRA_ARGS", env(m.sidecar)["TS_TAILSCALED_EXTRA_ARGS"].Value, "--state=mem:"},
		{"proxy's hooks", m.proxy.Lifecycle, nil},
		{"sidecar's hooks", m.sidecar.Lifecycle, nil},
	}
}

// Each pod is a node that keeps its key, and a host of the service for as long as clients may come.
func oneNameFacts(t *testing.T, m *manifests) []fact {
	sidecar := env(m.sidecar)
	return []fact{
		{"workload", m.statefulSet.Name, name + "-replica"},
		{"TS_HOSTNAME", sidecar["TS_HOSTNAME"].ValueFrom, json.RawMessage(`{"fieldRef":{"fieldPath":"metadata.name"}}`)},
		{"TS_TAILSCALED_EXTRA_ARGS", sidecar["TS_TAILSCALED_EXTRA_ARGS"].Value, ""},
		{"claim", only(t, m.statefulSet.Spec.VolumeClaimTemplates).Name, "tailscale-state"},
		{"group that may write there", m.pod.Spec.SecurityContext.FSGroup, m.sidecar.SecurityContext.RunAsGroup},
		// Or containerboot takes the service back while it is drained.
		{"TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT", sidecar["TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT"].Value, "false"},
		{"sidecar's hooks", m.sidecar.Lifecycle, json.RawMessage(`{"preStop":{"exec":{"command":[
			"tailscale","--socket=/var/run/tailscale/tailscaled.sock","serve","drain","svc:anthropic-oauth-proxy"]}}}`)},
		{"the proxy goes on for 15 s after that", preStop(m) >= 15, true},
		{"and a new pod is trusted after that time", m.statefulSet.Spec.MinReadySeconds, preStop(m)},
		{"unavailable at a time", m.budget.Spec.MaxUnavailable, 1},
		{"Service's selector", m.service.Spec.Selector, m.selector},
		{"PodDisruptionBudget's selector", m.budget.Spec.Selector.MatchLabels, m.selector},
		{"on different machines", only(t, m.pod.Spec.TopologySpreadConstraints).LabelSelector.MatchLabels, m.selector},
	}
}

// preStop is for how many seconds the proxy goes on when its pod is told to end.
func preStop(m *manifests) int64 {
	if m.proxy.Lifecycle == nil || m.proxy.Lifecycle.PreStop == nil || m.proxy.Lifecycle.PreStop.Sleep == nil {
		return 0
	}
	return m.proxy.Lifecycle.PreStop.Sleep.Seconds
}

// ports are the proxy's by name.
func ports(m *manifests) map[string]int32 {
	all := map[string]int32{}
	for _, p := range m.proxy.Ports {
		all[p.Name] = p.ContainerPort
	}
	return all
}

// asks is the port and path of a probe.
func asks(p *corev1.Probe) string {
	if p == nil || p.HTTPGet == nil {
		return ""
	}
	return p.HTTPGet.Port.String() + p.HTTPGet.Path
}

// sizes are a container's requests and limits, as in RUNBOOK.md.
func sizes(c corev1.Container) string {
	requests, limits := c.Resources.Requests, c.Resources.Limits
	return fmt.Sprintf("%s | %s | %s | %s", requests.Cpu(), limits.Cpu(), requests.Memory(), limits.Memory())
}

// env is a container's environment.
func env(c corev1.Container) map[string]corev1.EnvVar {
	all := map[string]corev1.EnvVar{}
	for _, e := range c.Env {
		all[e.Name] = e
	}
	return all
}

// mount tells which volume a container has in a folder.
func mount(c corev1.Container, folder string) string {
	for _, v := range c.VolumeMounts {
		if v.MountPath == folder && v.SubPath == "" {
			return v.Name + map[bool]string{true: ", read-only", false: ", writable"}[v.ReadOnly]
		}
	}
	return ""
}

// TestPodSecurity is the real admission check of the level that the namespace enforces.
func TestPodSecurity(t *testing.T) {
	evaluator := proxytest.Must(policy.NewEvaluator(policy.DefaultChecks()))(t)
	level := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	for _, folder := range []string{onePod, oneName} {
		m := load(t, folder)
		violations := func() string {
			result := policy.AggregateCheckResults(evaluator.EvaluatePod(level, &m.pod.ObjectMeta, &m.pod.Spec))
			return result.ForbiddenDetail()
		}
		check(t, fact{folder + "'s violations", violations(), ""})
		m.sidecar.SecurityContext.Capabilities = nil // the pod's, too
		check(t, fact{"one that drops no capabilities passes", violations() == "", false})
	}
}

// The ConfigMap says what the program does without a file, but for the one setting that makes a pod in a shared cluster safe, the
// bodies that fit its memory beside a thousand connections, the probes' own port, and the listener that tailscaled serves from.
// The real program reads it.
func TestConfigMapIsDefaults(t *testing.T) {
	for folder, proxyProtocol := range map[string]string{onePod: "", oneName: "127.0.0.2:8082"} {
		stated := load(t, folder).configMap.Data["config.toml"]
		want := parse(t, effective(t, "# nothing"))
		maps.Copy(want["proxy"].(map[string]any), map[string]any{
			"require_tailnet": true, "body_memory_mb": 24, "health_addr": "0.0.0.0:8081", "proxy_protocol_addr": proxyProtocol,
		})
		check(t, fact{folder + ": what the program makes of it", parse(t, effective(t, stated)), want})
		check(t, fact{folder + ": what it states, so that whoever edits it finds every key", parse(t, stated), want})
	}
}

// effective is what `-check-config` prints for a configuration.
func effective(t *testing.T, config string) string {
	t.Helper()
	ran := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Config: config})
	check(t, fact{"-check-config says " + ran.Stderr, ran.Code, 0})
	return ran.Stdout
}

func parse(t *testing.T, text string) (c map[string]any) {
	t.Helper()
	proxytest.Must(toml.Decode(text, &c))(t)
	return c
}
