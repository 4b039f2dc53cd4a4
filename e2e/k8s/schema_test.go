package k8s

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/yannh/kubeconform/pkg/validator"
)

// kubernetes is the module whose OpenAPI document describes every object. It is
// downloaded, never built.
const kubernetes = "k8s.io/kubernetes@v1.37.2"

// TestSchemas is `kubeconform -strict` with the schemas of a real release.
func TestSchemas(t *testing.T) {
	rendered, err := render(t, "k8s").AsYaml()
	if err != nil {
		t.Fatal(err)
	}
	schemas := writeSchemas(t, openAPI(t))
	v, err := validator.New([]string{filepath.Join(schemas, "{{.ResourceKind}}{{.KindSuffix}}.json")}, validator.Opts{Strict: true})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range []struct {
		about    string
		old, new string
		want     validator.Status
	}{
		{"as it is", "", "", validator.Valid},
		{"a misspelt field", "automountServiceAccountToken:", "automountServiceAcountToken:", validator.Invalid},
		{"a wrong type", "replicas: 1", "replicas: one", validator.Invalid},
	} {
		t.Run(c.about, func(t *testing.T) {
			text := bytes.ReplaceAll(rendered, []byte(c.old), []byte(c.new))
			if c.old == "" {
				text = rendered
			} else if bytes.Equal(text, rendered) {
				t.Fatalf("no %q in the manifests", c.old)
			}
			worst := validator.Valid
			results := v.Validate("k8s", io.NopCloser(bytes.NewReader(text)))
			for _, r := range results {
				if r.Status != validator.Valid {
					worst = r.Status
					t.Logf("%v %v", r.Err, r.ValidationErrors)
				}
			}
			if worst != c.want || len(results) != 5 {
				t.Errorf("status %v of %d objects, want %v of 5", worst, len(results), c.want)
			}
		})
	}
}

// schema is a JSON schema, or a part of one.
type schema = map[string]any

// openAPI returns the definitions of Kubernetes' OpenAPI document.
func openAPI(t *testing.T) map[string]schema {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", kubernetes)
	cmd.Dir = t.TempDir() // outside of any module: go.mod stays as it is
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("downloading %s: %v\n%s", kubernetes, err, out)
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(out, &module); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(module.Dir, "api/openapi-spec/swagger.json"))
	if err != nil {
		t.Fatal(err)
	}
	var document struct{ Definitions map[string]schema }
	if err := json.Unmarshal(text, &document); err != nil {
		t.Fatal(err)
	}
	return document.Definitions
}

// writeSchemas writes a file for each kind, under the names that kubeconform
// looks for, and returns their folder.
func writeSchemas(t *testing.T, definitions map[string]schema) string {
	t.Helper()
	dir := t.TempDir()
	write := func(name string, content any) {
		text, err := json.Marshal(content)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".json"), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, definition := range definitions {
		definitions[name] = strict(definition)
	}
	write("definitions", schema{"definitions": definitions})
	for name, definition := range definitions {
		kinds, _ := definition["x-kubernetes-group-version-kind"].([]any)
		for _, k := range kinds {
			kind := k.(schema)
			group, _, _ := strings.Cut(kind["group"].(string), ".")
			file := strings.ToLower(kind["kind"].(string))
			for _, part := range []string{group, kind["version"].(string)} {
				if part != "" {
					file += "-" + part
				}
			}
			write(file, schema{"$ref": "definitions.json#/definitions/" + name})
		}
	}
	return dir
}

// strict makes a definition refuse fields that it does not name, and refer to
// other definitions by the name of their file.
func strict(s schema) schema {
	if ref, ok := s["$ref"].(string); ok {
		name := strings.TrimPrefix(ref, "#/definitions/")
		if strings.HasSuffix(name, ".IntOrString") || strings.HasSuffix(name, ".Quantity") {
			return schema{"type": []string{"string", "integer", "number"}}
		}
		return schema{"$ref": "definitions.json#/definitions/" + name}
	}
	out := schema{}
	for key, value := range s {
		switch key {
		case "description", "format": // int-or-string and byte are no formats of JSON schema
		case "items", "additionalProperties":
			out[key] = value
			if part, ok := value.(schema); ok {
				out[key] = strict(part)
			}
		case "properties":
			properties := schema{}
			for name, property := range value.(schema) {
				properties[name] = strict(property.(schema))
			}
			out[key] = properties
			if _, ok := s["additionalProperties"]; !ok {
				out["additionalProperties"] = false
			}
		default:
			out[key] = value
		}
	}
	return out
}
