// Package k8s tests the manifests in k8s/ as kubectl sees them: rendered by kustomize, and held against the contract, the Pod
// Security Standards, Kubernetes' own schemas and the program.
package k8s

import (
	"os"
	"path/filepath"
	"testing"

	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/api/resmap"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

const (
	root = "../.." // the project's, from this folder

	// name is what the contract calls the namespace and nearly everything in it.
	name = "anthropic-oauth-proxy"

	// What can be applied: one pod, or several behind one name; and to either, where the Prometheus operator is, monitoring.
	onePod     = "k8s"
	oneName    = "k8s/overlays/one-name"
	monitoring = "k8s/components/monitoring"
)

// render is `kubectl kustomize FOLDER`.
func render(t *testing.T, folder string) resmap.ResMap {
	t.Helper()
	return proxytest.Must(krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(root, folder)))(t)
}

// object is one of JSON's.
type object = map[string]any

// decode decodes a folder's object of this kind.
func decode[T any](t *testing.T, folder, kind string) (decoded T) {
	t.Helper()
	for _, r := range render(t, folder).Resources() {
		if r.GetKind() == kind {
			proxytest.Check(t, yaml.Unmarshal([]byte(r.MustYaml()), &decoded))
			return decoded
		}
	}
	t.Fatalf("%s has no %s", folder, kind)
	return decoded
}
