// Package k8s tests the manifests in k8s/ as kubectl sees them: rendered by kustomize, decoded without tolerance for unknown
// fields, and held against the contract, the Pod Security Standards, Kubernetes' own schemas and the program.
package k8s

import (
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/resmap"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

const (
	root = "../.." // the project's, from this folder

	// name is what the contract calls the namespace and nearly everything in it.
	name = "anthropic-oauth-proxy"

	// What can be applied: one pod, or several behind one name.
	onePod  = "k8s"
	oneName = "k8s/overlays/one-name"
)

// manifests are the objects of one of these folders, one of each kind.
type manifests struct {
	labels         map[string]map[string]string // of each object by its kind, and of the Pod
	namespace      corev1.Namespace
	serviceAccount corev1.ServiceAccount
	configMap      corev1.ConfigMap
	networkPolicy  networkingv1.NetworkPolicy
	deployment     appsv1.Deployment // of onePod
	statefulSet    appsv1.StatefulSet
	service        corev1.Service
	budget         policyv1.PodDisruptionBudget

	selector       map[string]string // of the Deployment or StatefulSet
	pod            corev1.PodTemplateSpec
	proxy, sidecar corev1.Container // of the pod
	settings       map[string]any   // [proxy] of the ConfigMap
}

// load decodes a folder, and fails if a kind is missing, there twice, or unexpected.
func load(t *testing.T, folder string) *manifests {
	t.Helper()
	m := &manifests{labels: map[string]map[string]string{}}
	objects := map[string]any{
		"Namespace": &m.namespace, "ServiceAccount": &m.serviceAccount, "ConfigMap": &m.configMap, "NetworkPolicy": &m.networkPolicy,
	}
	if folder == onePod {
		objects["Deployment"] = &m.deployment
	} else {
		objects["StatefulSet"], objects["Service"], objects["PodDisruptionBudget"] = &m.statefulSet, &m.service, &m.budget
	}
	for _, r := range render(t, folder).Resources() {
		kind := r.GetKind()
		if objects[kind] == nil {
			t.Fatalf("%s %s: not expected in %s, or there twice", kind, r.GetName(), folder)
		}
		proxytest.Check(t, yaml.UnmarshalStrict([]byte(r.MustYaml()), objects[kind]))
		delete(objects, kind)
		m.labels[kind] = r.GetLabels()
		check(t, fact{kind + "'s namespace", r.GetNamespace() == name || kind == "Namespace", true})
	}
	if len(objects) > 0 {
		t.Fatalf("%s lacks %v", folder, slices.Collect(maps.Keys(objects)))
	}
	m.settings = parse(t, m.configMap.Data["config.toml"])["proxy"].(map[string]any)
	selector := m.deployment.Spec.Selector
	m.pod = m.deployment.Spec.Template
	if folder == oneName {
		selector, m.pod = m.statefulSet.Spec.Selector, m.statefulSet.Spec.Template
	}
	m.selector, m.labels["Pod"] = selector.MatchLabels, m.pod.Labels
	m.proxy, m.sidecar = only(t, m.pod.Spec.Containers), only(t, m.pod.Spec.InitContainers)
	return m
}

// render is `kubectl kustomize FOLDER`.
func render(t *testing.T, folder string) resmap.ResMap {
	t.Helper()
	return proxytest.Must(krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(root, folder)))(t)
}

// only returns the one element of a slice.
func only[T any](t *testing.T, slice []T) T {
	t.Helper()
	if len(slice) != 1 {
		t.Fatalf("%d elements instead of one: %+v", len(slice), slice)
	}
	return slice[0]
}

// fact is a value that was found, and the one that the contract asks for. They are equal if they are in JSON, where numbers have
// no sizes, and pointers are what they point to.
type fact struct {
	about     string
	got, want any
}

func check(t *testing.T, facts ...fact) {
	t.Helper()
	for _, f := range facts {
		got, want := proxytest.Must(json.Marshal(f.got))(t), proxytest.Must(json.Marshal(f.want))(t)
		if string(got) != string(want) {
			t.Errorf("%s: %s, want %s", f.about, got, want)
		}
	}
}
