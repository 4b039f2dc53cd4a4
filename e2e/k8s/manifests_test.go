package k8s

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podsecurity "k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
)

// name is what the contract calls the namespace and everything in it.
const name = "anthropic-oauth-proxy"

// fact is a value that was found, and the one that the contract asks for.
type fact struct {
	about     string
	got, want any
}

func check(t *testing.T, facts []fact) {
	t.Helper()
	for _, f := range facts {
		if got, want := fmt.Sprintf("%#v", f.got), fmt.Sprintf("%#v", f.want); got != want {
			t.Errorf("%s: got %s, want %s", f.about, got, want)
		}
	}
}

func TestNames(t *testing.T) {
	m := base(t)
	for kind, meta := range map[string]metav1.ObjectMeta{
		"ServiceAccount": m.serviceAccount.ObjectMeta,
		"ConfigMap":      m.configMap.ObjectMeta,
		"Deployment":     m.deployment.ObjectMeta,
		"NetworkPolicy":  m.networkPolicy.ObjectMeta,
	} {
		check(t, []fact{
			{kind + " name", meta.Name, name},
			{kind + " namespace", meta.Namespace, name},
		})
	}
	pod := m.deployment.Spec.Template.Spec
	check(t, []fact{
		{"namespace", m.namespace.Name, name},
		{"service account", pod.ServiceAccountName, name},
		{"proxy container", m.proxy(t).Name, "proxy"},
		{"sidecar container", m.sidecar(t).Name, "tailscaled"},
	})
}

func TestLabels(t *testing.T) {
	m := base(t)
	want := map[string]string{
		"app.kubernetes.io/name":       name,
		"app.kubernetes.io/instance":   name,
		"app.kubernetes.io/component":  "proxy",
		"app.kubernetes.io/part-of":    name,
		"app.kubernetes.io/managed-by": "kustomize",
		"app.kubernetes.io/version":    grep(t, "main.go", `^const version = "(.+)"$`),
	}
	for kind, labels := range map[string]map[string]string{
		"Namespace":      m.namespace.Labels,
		"ServiceAccount": m.serviceAccount.Labels,
		"ConfigMap":      m.configMap.Labels,
		"Deployment":     m.deployment.Labels,
		"NetworkPolicy":  m.networkPolicy.Labels,
		"Pod":            m.deployment.Spec.Template.Labels,
	} {
		for key, value := range want {
			check(t, []fact{{kind + " label " + key, labels[key], value}})
		}
	}
	selector := m.deployment.Spec.Selector.MatchLabels
	for key, value := range selector {
		check(t, []fact{{"pod's label " + key, m.deployment.Spec.Template.Labels[key], value}})
	}
	if _, ok := selector["app.kubernetes.io/version"]; ok || len(selector) == 0 {
		t.Errorf("selector %v: it can never be changed, so it must not name the version", selector)
	}
	if !maps.Equal(selector, m.networkPolicy.Spec.PodSelector.MatchLabels) {
		t.Errorf("the NetworkPolicy selects %v, the Deployment %v", m.networkPolicy.Spec.PodSelector.MatchLabels, selector)
	}
}

func TestImages(t *testing.T) {
	m := base(t)
	check(t, []fact{
		{"proxy", m.proxy(t).Image, name + ":" + grep(t, "main.go", `^const version = "(.+)"$`)},
		{"proxy pull policy", m.proxy(t).ImagePullPolicy, corev1.PullIfNotPresent},
		{"sidecar", m.sidecar(t).Image, "ghcr.io/tailscale/tailscale:" + grep(t, "go.mod", `tailscale\.com (v\S+)`)},
	})
}

// One pod at a time, since a second node of the same name is renamed.
func TestReplacement(t *testing.T) {
	spec := base(t).deployment.Spec
	check(t, []fact{
		{"replicas", *spec.Replicas, int32(1)},
		{"strategy", string(spec.Strategy.Type), "Recreate"},
	})
}

// A native sidecar starts before the proxy and outlives it. A startup probe on
// it would keep the proxy from ever naming a login failure.
func TestSidecarOrder(t *testing.T) {
	m := base(t)
	c := m.sidecar(t)
	if c.RestartPolicy == nil || *c.RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Errorf("restartPolicy %v: not a native sidecar", c.RestartPolicy)
	}
	if c.StartupProbe != nil || c.LivenessProbe != nil || c.Lifecycle != nil {
		t.Errorf("the sidecar has probes or hooks: %+v", c)
	}
}

func TestProbes(t *testing.T) {
	m := base(t)
	proxy := m.proxy(t)
	ports := map[string]int32{}
	for _, p := range proxy.Ports {
		ports[p.Name] = p.ContainerPort
	}
	check(t, []fact{{"ports", fmt.Sprint(ports), "map[health:8081 http:8080]"}})
	for _, p := range []struct {
		about, path string
		probe       *corev1.Probe
	}{
		{"startup", "/health", proxy.StartupProbe},
		{"readiness", "/health", proxy.ReadinessProbe},
		{"liveness", "/livez", proxy.LivenessProbe},
	} {
		if p.probe == nil || p.probe.HTTPGet == nil {
			t.Errorf("%s: no HTTP probe", p.about)
			continue
		}
		check(t, []fact{
			{p.about + " path", p.probe.HTTPGet.Path, p.path},
			{p.about + " port", p.probe.HTTPGet.Port.String(), "health"},
		})
	}

	// The proxy exits by itself after 1+2+4+8+16 s and names the error. Kubelet counts a startup
	// probe's failures across restarts: the probe has to outlast many of them.
	const retries = 31
	if s := proxy.StartupProbe; s.PeriodSeconds*s.FailureThreshold <= 100*retries {
		t.Errorf("the startup probe gives up after %d s, too early for restarts after %d s of retries each", s.PeriodSeconds*s.FailureThreshold, retries)
	}
	if s := proxy.StartupProbe; s.PeriodSeconds > 2 {
		t.Errorf("a period of %d s delays every start", s.PeriodSeconds)
	}
}

// The real admission check of the level that the namespace enforces.
func TestPodSecurity(t *testing.T) {
	m := base(t)
	for _, mode := range []string{"enforce", "audit", "warn"} {
		check(t, []fact{{mode, m.namespace.Labels["pod-security.kubernetes.io/"+mode], "restricted"}})
	}
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks())
	if err != nil {
		t.Fatal(err)
	}
	level := podsecurity.LevelVersion{Level: podsecurity.LevelRestricted, Version: podsecurity.LatestVersion()}
	violations := func(template corev1.PodTemplateSpec) policy.AggregateCheckResult {
		return policy.AggregateCheckResults(evaluator.EvaluatePod(level, &template.ObjectMeta, &template.Spec))
	}
	if r := violations(m.deployment.Spec.Template); !r.Allowed {
		t.Errorf("not restricted: %s", r.ForbiddenDetail())
	}
	m.deployment.Spec.Template.Spec.InitContainers[0].SecurityContext.Capabilities = nil
	if r := violations(m.deployment.Spec.Template); r.Allowed {
		t.Error("a container that drops no capabilities passes: the check checks nothing")
	}
}

// What the Pod Security Standards do not ask for.
func TestHardening(t *testing.T) {
	m := base(t)
	pod := m.deployment.Spec.Template.Spec
	check(t, []fact{
		{"pod's token", *pod.AutomountServiceAccountToken, false},
		{"account's token", *m.serviceAccount.AutomountServiceAccountToken, false},
		{"service links", *pod.EnableServiceLinks, false},
	})
	for _, v := range pod.Volumes {
		if v.Projected != nil || v.Secret != nil || v.HostPath != nil {
			t.Errorf("volume %s is neither an emptyDir nor the ConfigMap", v.Name)
		}
	}
	uids := map[int64]string{}
	for _, c := range []corev1.Container{m.proxy(t), m.sidecar(t)} {
		s := c.SecurityContext
		check(t, []fact{{c.Name + " read-only root", *s.ReadOnlyRootFilesystem, true}})
		if s.RunAsUser == nil || *s.RunAsUser == 0 {
			t.Fatalf("%s runs as %v", c.Name, s.RunAsUser)
		}
		if other, ok := uids[*s.RunAsUser]; ok {
			t.Errorf("%s and %s share uid %d: the proxy could reconfigure tailscaled", other, c.Name, *s.RunAsUser)
		}
		uids[*s.RunAsUser] = c.Name
	}
}

func TestResources(t *testing.T) {
	m := base(t)
	for _, r := range []struct {
		container                                        corev1.Container
		cpuRequest, cpuLimit, memoryRequest, memoryLimit string
		goMemory                                         string // the rest is for what the kernel counts, and Go does not
	}{
		{m.proxy(t), "50m", "500m", "32Mi", "128Mi", "96MiB"},
		{m.sidecar(t), "50m", "250m", "64Mi", "256Mi", "204MiB"},
	} {
		res := r.container.Resources
		check(t, []fact{
			{r.container.Name + " CPU request", res.Requests.Cpu().String(), r.cpuRequest},
			{r.container.Name + " CPU limit", res.Limits.Cpu().String(), r.cpuLimit},
			{r.container.Name + " memory request", res.Requests.Memory().String(), r.memoryRequest},
			{r.container.Name + " memory limit", res.Limits.Memory().String(), r.memoryLimit},
			{r.container.Name + " GOMEMLIMIT", env(r.container)["GOMEMLIMIT"], r.goMemory},
			// Whole CPUs, rounded up: by itself Go takes no fewer than two.
			{r.container.Name + " GOMAXPROCS", env(r.container)["GOMAXPROCS"], strconv.FormatInt(max(1, res.Limits.Cpu().Value()), 10)},
		})
	}

	// Go's share of the limit holds the body budget, and leaves room for the kernel's.
	soft, err := strconv.ParseInt(strings.TrimSuffix(env(m.proxy(t))["GOMEMLIMIT"], "MiB"), 10, 64)
	if err != nil {
		t.Fatalf("GOMEMLIMIT: %v", err)
	}
	limits := m.proxy(t).Resources.Limits
	limit := limits.Memory().Value() >> 20
	budget := config(t, m)["proxy"].(map[string]any)["body_memory_mb"].(int64)
	if soft < limit*70/100 || soft > limit*90/100 || budget > soft*2/3 {
		t.Errorf("GOMEMLIMIT %d MiB does not fit between body_memory_mb %d and the limit of %d MiB", soft, budget, limit)
	}
}

func TestEnvironment(t *testing.T) {
	m := base(t)
	check(t, []fact{{"LOG_LEVEL", env(m.proxy(t))["LOG_LEVEL"], "info"}})

	c := m.sidecar(t)
	want := map[string]string{
		"TS_HOSTNAME":              name,
		"TS_SOCKET":                "/var/run/tailscale/tailscaled.sock",
		"TS_STATE_DIR":             "/var/lib/tailscale/state",
		"TS_TAILSCALED_EXTRA_ARGS": "--state=mem:",
		"TS_KUBE_SECRET":           "",
		"TS_AUTH_ONCE":             "true",
		"TS_ACCEPT_DNS":            "false",
		"TS_USERSPACE":             "true",

		"TS_NETSTACK_KEEPALIVE_IDLE":     "15s",
		"TS_NETSTACK_KEEPALIVE_INTERVAL": "5s",
	}
	for key, value := range want {
		got, ok := env(c)[key]
		if !ok || got != value {
			t.Errorf("%s: %q (set: %v), want %q", key, got, ok, value)
		}
	}
	// containerboot's chmod of a folder of that name fails without root.
	if dir := env(c)["TS_STATE_DIR"]; path.Base(dir) == "tailscale" {
		t.Errorf("TS_STATE_DIR %s: its last element must not be tailscale", dir)
	}

	i := slices.IndexFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "TS_AUTHKEY" })
	if i < 0 || c.Env[i].ValueFrom == nil || c.Env[i].ValueFrom.SecretKeyRef == nil {
		t.Fatal("TS_AUTHKEY does not come from a Secret")
	}
	key := c.Env[i].ValueFrom.SecretKeyRef
	check(t, []fact{
		{"auth key's Secret", key.Name, "tailscale-authkey"},
		{"auth key's entry", key.Key, "TS_AUTHKEY"},
		{"auth key is optional", key.Optional == nil, true},
	})
}

func TestVolumes(t *testing.T) {
	m := base(t)
	volumes := map[string]corev1.VolumeSource{}
	for _, v := range m.deployment.Spec.Template.Spec.Volumes {
		volumes[v.Name] = v.VolumeSource
	}
	for _, mount := range []struct {
		container    corev1.Container
		volume, path string
		readOnly     bool
	}{
		{m.proxy(t), "config", "/etc/anthropic-oauth-proxy", true},
		{m.proxy(t), "tailscale-socket", "/var/run/tailscale", true},
		{m.sidecar(t), "tailscale-socket", "/var/run/tailscale", false},
		{m.sidecar(t), "tailscale-state", "/var/lib/tailscale", false},
	} {
		i := slices.IndexFunc(mount.container.VolumeMounts, func(v corev1.VolumeMount) bool { return v.Name == mount.volume })
		if i < 0 {
			t.Errorf("%s does not mount %s", mount.container.Name, mount.volume)
			continue
		}
		v := mount.container.VolumeMounts[i]
		check(t, []fact{
			{mount.container.Name + " " + mount.volume, v.MountPath, mount.path},
			{mount.container.Name + " " + mount.volume + " read-only", v.ReadOnly, mount.readOnly},
			{mount.volume + " subPath", v.SubPath, ""},
		})
	}
	check(t, []fact{
		{"number of volumes", len(volumes), 3},
		{"config", volumes["config"].ConfigMap.Name, name},
		{"socket", volumes["tailscale-socket"].EmptyDir != nil, true},
		{"state", volumes["tailscale-state"].EmptyDir != nil, true},
	})
}

// kubelet kills what outlives the grace period: the proxy's drain, then the
// sidecar's logout, for which tailscaled takes up to 5 s.
func TestGracePeriod(t *testing.T) {
	m := base(t)
	drain := config(t, m)["proxy"].(map[string]any)["drain_timeout_secs"].(int64)
	grace := *m.deployment.Spec.Template.Spec.TerminationGracePeriodSeconds
	if grace < drain+5+2 || grace > drain+30 {
		t.Errorf("a grace period of %d s does not fit a drain of %d s", grace, drain)
	}
}

func TestNetworkPolicy(t *testing.T) {
	m := base(t)
	spec := m.networkPolicy.Spec
	if got := fmt.Sprint(spec.PolicyTypes); got != "[Ingress Egress]" {
		t.Errorf("policy types %s", got)
	}
	in := only(t, "ingress rule", spec.Ingress)
	peer := only(t, "ingress peer", in.From)
	check(t, []fact{
		{"who may scrape", peer.NamespaceSelector.MatchLabels["kubernetes.io/metadata.name"], "monitoring"},
		{"pods of that namespace", peer.PodSelector == nil, true},
		{"blocks", peer.IPBlock == nil, true},
		{"what they may reach", only(t, "ingress port", in.Ports).Port.String(), "health"},
	})

	var out []string
	for _, rule := range spec.Egress {
		if len(rule.To) != 0 {
			t.Errorf("egress is limited to %+v", rule.To)
		}
		for _, p := range rule.Ports {
			port := "any"
			if p.Port != nil {
				port = p.Port.String()
			}
			out = append(out, string(*p.Protocol)+" "+port)
		}
	}
	slices.Sort(out)
	check(t, []fact{{"egress", out, []string{"TCP 443", "TCP 53", "TCP 80", "UDP any"}}})
}

// env returns the values that a container's environment states literally.
func env(c corev1.Container) map[string]string {
	vars := map[string]string{}
	for _, e := range c.Env {
		if e.ValueFrom == nil {
			vars[e.Name] = e.Value
		}
	}
	return vars
}

// config decodes the ConfigMap's config.toml.
func config(t *testing.T, m manifests) map[string]any {
	t.Helper()
	var c map[string]any
	if _, err := toml.Decode(m.configMap.Data["config.toml"], &c); err != nil {
		t.Fatal(err)
	}
	return c
}
