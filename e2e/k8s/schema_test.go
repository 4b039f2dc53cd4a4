package k8s

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/yannh/kubeconform/pkg/validator"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// kubernetes is the module whose OpenAPI documents describe every object. It is downloaded, never built.
const kubernetes = "k8s.io/kubernetes@v1.37.2"

// TestSchemas is `kubeconform -strict` with the schemas of a real release.
func TestSchemas(t *testing.T) {
	location := filepath.Join(writeSchemas(t), "{{.ResourceKind}}{{.KindSuffix}}.json")
	kubeconform := proxytest.Must(validator.New([]string{location}, validator.Opts{Strict: true}))(t)
	for _, c := range []struct {
		about, folder, old, new string
		invalid                 int
	}{
		{"one pod", onePod, "", "", 0},
		{"one name", oneName, "", "", 0},
		{"a misspelt field", onePod, "enableServiceLinks:", "enableServicesLinks:", 1},
		{"a wrong type", onePod, "replicas: 1", "replicas: one", 1},
	} {
		t.Run(c.about, func(t *testing.T) {
			objects := render(t, c.folder)
			text := strings.Replace(string(proxytest.Must(objects.AsYaml())(t)), c.old, c.new, 1)
			found := map[validator.Status]int{}
			for _, r := range kubeconform.Validate(c.folder, io.NopCloser(strings.NewReader(text))) {
				found[r.Status]++
				t.Logf("%v %v", r.Err, r.ValidationErrors)
			}
			if found[validator.Invalid] != c.invalid || found[validator.Valid] != objects.Size()-c.invalid {
				t.Errorf("%v, want %d invalid objects of %d", found, c.invalid, objects.Size())
			}
		})
	}
}

// writeSchemas writes, under the names that kubeconform looks for, a schema of each kind that refers to the OpenAPI document of
// its group, whose schemas now refuse fields that they do not name. It returns their folder.
func writeSchemas(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("go", "mod", "download", "-json", kubernetes)
	cmd.Dir = dir // outside of any module: go.mod stays as it is
	var module struct{ Dir, Error string }
	proxytest.Check(t, json.Unmarshal(proxytest.Must(cmd.Output())(t), &module))
	write := func(name string, content any) {
		proxytest.Check(t, os.WriteFile(filepath.Join(dir, name), proxytest.Must(json.Marshal(content))(t), 0o600))
	}
	for suffix, file := range map[string]string{
		"-v1": "api__v1_openapi.json", "-apps-v1": "apis__apps__v1_openapi.json",
		"-networking-v1": "apis__networking.k8s.io__v1_openapi.json", "-policy-v1": "apis__policy__v1_openapi.json",
	} {
		var document struct {
			Components struct {
				Schemas map[string]object `json:"schemas"`
			} `json:"components"`
		}
		text := proxytest.Must(os.ReadFile(filepath.Join(module.Dir, "api/openapi-spec/v3", file)))(t)
		proxytest.Check(t, json.Unmarshal(text, &document))
		for name, schema := range document.Components.Schemas {
			if schema["properties"] != nil && schema["additionalProperties"] == nil {
				schema["additionalProperties"] = false
			}
			kind := strings.ToLower(name[strings.LastIndex(name, ".")+1:])
			write(kind+suffix+".json", object{"$ref": file + "#/components/schemas/" + name})
		}
		write(file, document)
	}
	return dir
}
