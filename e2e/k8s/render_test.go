// Package k8s tests the manifests in k8s/ as kubectl sees them: rendered by
// kustomize, decoded without tolerance for unknown fields, and held against the
// contract, the Pod Security Standards, Kubernetes' own schemas and the program.
package k8s

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/resmap"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// root is the project's root, from this folder.
const root = "../.."

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

// render is `kubectl kustomize DIR`, with DIR below the project's root.
func render(t *testing.T, dir string) resmap.ResMap {
	t.Helper()
	k := krusty.MakeKustomizer(krusty.MakeDefaultOptions())
	objects, err := k.Run(filesys.MakeFsOnDisk(), filepath.Join(root, dir))
	if err != nil {
		t.Fatalf("kustomize %s: %v", dir, err)
	}
	return objects
}

// manifests are the objects of k8s/, one of each kind.
type manifests struct {
	namespace      corev1.Namespace
	serviceAccount corev1.ServiceAccount
	configMap      corev1.ConfigMap
	deployment     appsv1.Deployment
	networkPolicy  networkingv1.NetworkPolicy
}

// base decodes k8s/, and fails if a kind is missing, there twice, or unexpected.
func base(t *testing.T) manifests {
	t.Helper()
	var m manifests
	want := map[string]any{
		"Namespace":      &m.namespace,
		"ServiceAccount": &m.serviceAccount,
		"ConfigMap":      &m.configMap,
		"Deployment":     &m.deployment,
		"NetworkPolicy":  &m.networkPolicy,
	}
	for _, r := range render(t, "k8s").Resources() {
		object, ok := want[r.GetKind()]
		if !ok {
			t.Fatalf("%s %s: not expected in k8s/, or there twice", r.GetKind(), r.GetName())
		}
		text, err := r.AsYAML()
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			t.Fatalf("%s: %v", r.GetKind(), err)
		}
		delete(want, r.GetKind())
	}
	for kind := range want {
		t.Errorf("k8s/ has no %s", kind)
	}
	return m
}

// sidecar and proxy are the pod's two containers.
func (m *manifests) sidecar(t *testing.T) corev1.Container {
	t.Helper()
	return only(t, "initContainer", m.deployment.Spec.Template.Spec.InitContainers)
}

func (m *manifests) proxy(t *testing.T) corev1.Container {
	t.Helper()
	return only(t, "container", m.deployment.Spec.Template.Spec.Containers)
}

// only returns the one element of a slice.
func only[T any](t *testing.T, what string, slice []T) T {
	t.Helper()
	if len(slice) != 1 {
		t.Fatalf("%d elements instead of one %s: %+v", len(slice), what, slice)
	}
	return slice[0]
}

// grep returns the first group of the pattern's first match in a file of the
// project.
func grep(t *testing.T, file, pattern string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, file))
	if err != nil {
		t.Fatal(err)
	}
	match := regexp.MustCompile("(?m)" + pattern).FindSubmatch(text)
	if match == nil {
		t.Fatalf("%s has no line like %s", file, pattern)
	}
	return string(match[1])
}
