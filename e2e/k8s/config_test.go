package k8s

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	"github.com/BurntSushi/toml"
)

// The ConfigMap says what the program does without a file, but for the one
// setting that makes a pod in a shared cluster safe, the bodies that fit its
// memory beside a thousand connections, and the probes' own port. The real program reads it.
func TestConfigMapIsDefaults(t *testing.T) {
	m := base(t)
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(m.configMap.Data["config.toml"]), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty.toml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}

	got, want := effective(t, file), effective(t, empty)
	proxy := want["proxy"].(map[string]any)
	proxy["require_tailnet"] = true
	proxy["body_memory_mb"] = int64(24)
	proxy["health_addr"] = "0.0.0.0:8081"
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the ConfigMap makes\n%v\nwhere the program's defaults, require_tailnet, body_memory_mb and health_addr make\n%v", got, want)
	}

	// Whoever edits the ConfigMap finds every key there.
	if stated := config(t, m); !reflect.DeepEqual(stated, want) {
		t.Errorf("the ConfigMap states\n%v\nof the program's\n%v", stated, want)
	}
}

// effective is what `-check-config` prints for a file.
func effective(t *testing.T, file string) map[string]any {
	t.Helper()
	binary, err := proxytest.Build()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "-config", file, "-check-config")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, stderr.String())
	}
	var c map[string]any
	if _, err := toml.Decode(string(out), &c); err != nil {
		t.Fatalf("-check-config printed no TOML: %v\n%s", err, out)
	}
	return c
}
