package proxytest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildWith builds the program as it is released, in dir, with files that stand in
// for its own or Go's, or are added to them (go build -overlay): their contents by
// path, which is relative to the program's module if it is not absolute. Flags are
// more arguments of go build.
func BuildWith(dir string, files map[string][]byte, flags ...string) (path string, err error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for name, content := range files {
		source := filepath.Join(dir, fmt.Sprintf("overlay%d.go", len(replace)))
		if !filepath.IsAbs(name) {
			name = filepath.Join(root, name)
		}
		replace[name] = source
		err = errors.Join(err, os.WriteFile(source, content, 0o644))
	}
	overlay := filepath.Join(dir, "overlay.json")
	list, jsonErr := json.Marshal(map[string]any{"Replace": replace})
	if err := errors.Join(err, jsonErr, os.WriteFile(overlay, list, 0o644)); err != nil {
		return "", fmt.Errorf("preparing a build of the proxy with other files: %w", err)
	}
	path = filepath.Join(dir, "anthropic-oauth-proxy")
	args := append([]string{"build", "-C", root, "-trimpath", "-tags", Tags, "-overlay", overlay, "-o", path}, flags...)
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the proxy with other files: %w\n%s", err, out)
	}
	return path, nil
}
