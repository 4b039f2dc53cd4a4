package k8s

import (
	"reflect"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// replicas decodes the overlay's StatefulSet, and fails if the Deployment is
// there too.
func replicas(t *testing.T) appsv1.StatefulSet {
	t.Helper()
	var set appsv1.StatefulSet
	for _, r := range render(t, "k8s/overlays/one-name").Resources() {
		switch r.GetKind() {
		case "Deployment":
			t.Fatal("one-name has a Deployment: two workloads would choose the same pods")
		case "StatefulSet":
			text, err := r.AsYAML()
			if err != nil {
				t.Fatal(err)
			}
			if err := yaml.UnmarshalStrict(text, &set); err != nil {
				t.Fatal(err)
			}
		}
	}
	if set.Name == "" {
		t.Fatal("one-name has no StatefulSet")
	}
	return set
}

// TestOneNamePod finds the Deployment's pod in the StatefulSet, but for what
// makes each pod a node that keeps its key.
func TestOneNamePod(t *testing.T) {
	m := base(t)
	set := replicas(t)
	want, got := m.deployment.Spec.Template.Spec, set.Spec.Template.Spec

	sidecar := only(t, "sidecar", got.InitContainers)
	environment := map[string]corev1.EnvVar{}
	for _, e := range sidecar.Env {
		environment[e.Name] = e
	}
	if from := environment["TS_HOSTNAME"].ValueFrom; from == nil || from.FieldRef == nil || from.FieldRef.FieldPath != "metadata.name" {
		t.Errorf("TS_HOSTNAME is %+v, not the pod's name", environment["TS_HOSTNAME"])
	}
	if e, found := environment["TS_TAILSCALED_EXTRA_ARGS"]; found {
		t.Errorf("the node key would not be kept: %s", e.Value)
	}
	claim := only(t, "volume claim", set.Spec.VolumeClaimTemplates)
	if claim.Name != "tailscale-state" {
		t.Errorf("the claim is for %s", claim.Name)
	}
	if group := got.SecurityContext.FSGroup; group == nil || *group != *sidecar.SecurityContext.RunAsGroup {
		t.Errorf("fsGroup %v lets the sidecar not write to its volume", group)
	}

	// How it is a host of the service, for as long as clients may come.
	if e := environment["TS_EXPERIMENTAL_SERVICE_AUTO_ADVERTISEMENT"]; e.Value != "false" {
		t.Error("containerboot would take the service back while it is drained")
	}
	drain := sidecar.Lifecycle.PreStop.Exec.Command
	if got, want := strings.Join(drain, " "), "tailscale --socket=/var/run/tailscale/tailscaled.sock serve drain svc:anthropic-oauth-proxy"; got != want {
		t.Errorf("the sidecar's preStop is %q, not %q", got, want)
	}
	sleep := only(t, "container", got.Containers).Lifecycle.PreStop.Sleep.Seconds
	if sleep < 15 || set.Spec.MinReadySeconds != int32(sleep) || *got.TerminationGracePeriodSeconds != sleep+*want.TerminationGracePeriodSeconds {
		t.Errorf("the proxy goes on for %d s after the drain, a new pod is trusted after %d s, the pod has %d s to end", sleep, set.Spec.MinReadySeconds, *got.TerminationGracePeriodSeconds)
	}

	// What remains after these differences must be the same.
	got.InitContainers[0].Lifecycle, got.InitContainers[0].Command, got.Containers[0].Lifecycle = nil, nil, nil
	got.TerminationGracePeriodSeconds = want.TerminationGracePeriodSeconds
	got.SecurityContext.FSGroup = nil
	got.TopologySpreadConstraints = nil
	got.InitContainers[0].Env = want.InitContainers[0].Env
	var volumes []corev1.Volume
	for _, v := range want.Volumes {
		if v.Name != claim.Name {
			volumes = append(volumes, v)
		}
	}
	want.Volumes = volumes
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the StatefulSet's pod differs from the Deployment's:\n%+v\n%+v", got, want)
	}
}

// TestOneNameCommon compares the objects that both have.
func TestOneNameCommon(t *testing.T) {
	inBase := map[string]string{}
	for _, r := range render(t, "k8s").Resources() {
		inBase[r.GetKind()] = r.MustYaml()
	}
	for _, r := range render(t, "k8s/overlays/one-name").Resources() {
		switch r.GetKind() {
		case "StatefulSet", "Service", "PodDisruptionBudget":
			continue
		}
		// A listener more, which tailscaled serves from.
		if got := strings.Replace(r.MustYaml(), `proxy_protocol_addr = "127.0.0.2:8082"`, `proxy_protocol_addr = ""`, 1); got != inBase[r.GetKind()] {
			t.Errorf("%s is not that of k8s/:\n%s", r.GetKind(), got)
		}
	}
}
