package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

// name is the contract's name of the namespace, the Deployment, the ConfigMap
// and the tailnet node.
const name = "anthropic-oauth-proxy"

// overlay is what differs from k8s/ here: where the control server and the
// upstream are, whom to trust, and the images. The rest of a criterion's need
// goes through the configuration file.
type overlay struct {
	manifests    string // absolute path of k8s/
	proxyImage   string
	sidecarImage string
	loginServer  string
	upstream     string
	authority    string            // PEM
	oneName      bool              // on top of the overlay of that name instead of k8s/
	monitoring   bool              // with the component of that name
	config       map[string]string // replaced text of config.toml, old to new
}

// with returns a copy whose configuration file has new instead of old.
func (o overlay) with(old, new string) overlay {
	config := map[string]string{old: new}
	for k, v := range o.config {
		config[k] = v
	}
	o.config = config
	return o
}

// replica is the name of the StatefulSet, whose pods have a number behind it.
const replica = name + "-replica"

type object = map[string]any

// authorityDir is where the pod finds the upstream's authority.
const authorityDir = "/etc/upstream-ca"

// write makes the overlay's kustomization below dir and returns its folder.
func (o overlay) write(dir string) (string, error) {
	dir, err := os.MkdirTemp(dir, "overlay-")
	if err != nil {
		return "", err
	}
	base, err := filepath.Rel(dir, o.base()) // kustomize refuses absolute paths
	if err != nil {
		return "", err
	}
	configMap, err := o.configMap()
	if err != nil {
		return "", err
	}
	kustomization := object{
		"apiVersion": "kustomize.config.k8s.io/v1beta1",
		"kind":       "Kustomization",
		"resources":  []string{base, "authority.yaml"},
		"patches":    []object{{"path": "configmap.yaml"}, {"path": "workload.yaml"}},
	}
	if o.monitoring {
		kustomization["components"] = []string{filepath.Join(base, "components/monitoring")}
	}
	files := map[string]any{
		"authority.yaml":     object{"apiVersion": "v1", "kind": "ConfigMap", "metadata": object{"name": "upstream-ca", "namespace": name}, "data": object{"ca.pem": o.authority}},
		"configmap.yaml":     configMap,
		"workload.yaml":      o.workload(),
		"kustomization.yaml": kustomization,
	}
	for file, content := range files {
		text, err := json.Marshal(content) // JSON is YAML
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, file), text, 0o644); err != nil {
			return "", err
		}
	}
	return dir, nil
}

// base is the folder that the overlay lies on.
func (o overlay) base() string {
	if o.oneName {
		return filepath.Join(o.manifests, "overlays/one-name")
	}
	return o.manifests
}

// workload is the patch of what makes the pods.
func (o overlay) workload() object {
	kind, workload, upArgs := "Deployment", name, "--login-server="+o.loginServer
	if o.oneName {
		// The test's control server gives no tags with an auth key.
		kind, workload, upArgs = "StatefulSet", replica, upArgs+" --advertise-tags=tag:claude"
	}
	spec := object{
		"initContainers": []object{{
			"name":  "tailscaled",
			"image": o.sidecarImage,
			"env":   []object{{"name": "TS_EXTRA_ARGS", "value": upArgs}},
		}},
		"containers": []object{{
			"name":         "proxy",
			"image":        o.proxyImage,
			"env":          []object{{"name": "SSL_CERT_FILE", "value": authorityDir + "/ca.pem"}},
			"volumeMounts": []object{{"name": "upstream-ca", "mountPath": authorityDir, "readOnly": true}},
		}},
		"volumes": []object{{"name": "upstream-ca", "configMap": object{"name": "upstream-ca"}}},
	}
	return object{
		"apiVersion": "apps/v1",
		"kind":       kind,
		"metadata":   object{"name": workload, "namespace": name},
		"spec":       object{"template": object{"spec": spec}},
	}
}

// configMap is the manifests' own with the upstream and o.config exchanged.
func (o overlay) configMap() (*corev1.ConfigMap, error) {
	text, err := os.ReadFile(filepath.Join(o.base(), "configmap.yaml"))
	if err != nil {
		return nil, err
	}
	var m corev1.ConfigMap
	if err := yaml.UnmarshalStrict(text, &m); err != nil {
		return nil, fmt.Errorf("reading configmap.yaml: %w", err)
	}
	changes := o.with("https://api.anthropic.com", o.upstream).config
	config := m.Data["config.toml"]
	for old, new := range changes {
		if strings.Count(config, old) != 1 {
			return nil, fmt.Errorf("config.toml does not hold %q once:\n%s", old, config)
		}
		config = strings.Replace(config, old, new, 1)
	}
	m.Data["config.toml"] = config
	return &m, nil
}
