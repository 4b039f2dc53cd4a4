package main

import (
	"bytes"
	"embed"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// name is the contract's name of the namespace, the Deployment, the ConfigMap and the tailnet node.
const name = "anthropic-oauth-proxy"

// replica is the name of the StatefulSet, whose pods have a number behind it.
const replica = name + "-replica"

// overlay is what a deployment lies on and what it changes; testdata/kustomization.yaml has the rest.
type overlay struct {
	manifests   string // absolute path of k8s/
	loginServer string
	oneName     bool     // on top of the overlay of that name instead of k8s/
	monitoring  bool     // with the component of that name
	config      []string // texts of config.toml, each followed by its replacement
}

//go:embed testdata/*.yaml
var testdata embed.FS

var templates = template.Must(template.New("").Option("missingkey=error").ParseFS(testdata, "testdata/*.yaml"))

type object = map[string]any

// render fills a template of testdata in.
func (t *test) render(file string, data object) []byte {
	var text bytes.Buffer
	t.check(templates.ExecuteTemplate(&text, file, data))
	return text.Bytes()
}

// write makes the overlay's folder.
func (t *test) write(o overlay) (dir string) {
	dir = must(os.MkdirTemp(t.dir, "overlay-"))(t)
	base := must(filepath.Rel(dir, o.base()))(t) // kustomize refuses absolute paths
	var m corev1.ConfigMap
	t.check(yaml.UnmarshalStrict(must(os.ReadFile(filepath.Join(o.base(), "configmap.yaml")))(t), &m))
	config := m.Data["config.toml"]
	for change := range slices.Chunk(append([]string{"https://api.anthropic.com", t.upstream.URL}, o.config...), 2) {
		if strings.Count(config, change[0]) != 1 {
			t.fatalf("config.toml does not hold %q once:\n%s", change[0], config)
		}
		config = strings.Replace(config, change[0], change[1], 1)
	}
	kustomization := t.render("kustomization.yaml", object{
		"Base": base, "OneName": o.oneName, "Monitoring": o.monitoring, "Config": config,
		"LoginServer": o.loginServer, "ProxyImage": t.proxyImage, "SidecarImage": t.sidecarImage,
	})
	t.check(os.WriteFile(filepath.Join(dir, "ca.pem"), must(os.ReadFile(t.upstream.CAFile))(t), 0o644))
	t.check(os.WriteFile(filepath.Join(dir, "kustomization.yaml"), kustomization, 0o644))
	return dir
}

// base is the folder that the overlay lies on.
func (o overlay) base() string {
	if o.oneName {
		return filepath.Join(o.manifests, "overlays/one-name")
	}
	return o.manifests
}
