package k8s

import (
	"reflect"
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
	for _, r := range render(t, "k8s/overlays/scale-out").Resources() {
		switch r.GetKind() {
		case "Deployment":
			t.Fatal("scale-out has a Deployment: two workloads would choose the same pods")
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
		t.Fatal("scale-out has no StatefulSet")
	}
	return set
}

// TestScaleOutPod finds the Deployment's pod in the StatefulSet, but for what
// makes each pod a node that keeps its key.
func TestScaleOutPod(t *testing.T) {
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

	// What remains after these differences must be the same.
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

// TestScaleOutCommon compares the objects that both have.
func TestScaleOutCommon(t *testing.T) {
	inBase := map[string]string{}
	for _, r := range render(t, "k8s").Resources() {
		inBase[r.GetKind()] = r.MustYaml()
	}
	for _, r := range render(t, "k8s/overlays/scale-out").Resources() {
		switch r.GetKind() {
		case "StatefulSet", "Service", "PodDisruptionBudget":
			continue
		}
		if got := r.MustYaml(); got != inBase[r.GetKind()] {
			t.Errorf("%s is not that of k8s/:\n%s", r.GetKind(), got)
		}
	}
}
