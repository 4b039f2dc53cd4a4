package proxytest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// Tags are the build tags of every release build; they leave parts of the
// tailscale client out that the proxy never calls.
const Tags = "ts_omit_debugeventbus,ts_omit_syspolicy"

// build compiles the proxy on the first call only.
var build = sync.OnceValues(compile)

// Build compiles the program from the parent module, once per process, and
// returns the binary's path. It is built as it is released, unless the
// environment has E2E_RACE=1: then with the race detector, which needs cgo and
// makes it larger and slower. [Cleanup] removes it.
func Build() (string, error) { return build() }

// Raced reports whether [Build] adds the race detector, so that tests of size
// and speed can tell that theirs is not the released program.
func Raced() bool { return os.Getenv("E2E_RACE") == "1" }

// Cleanup removes what Build left behind. Call it last: a process that still
// runs is not harmed, one that is started later is not found.
func Cleanup() error {
	path, err := build()
	if err != nil {
		return nil // nothing was left
	}
	return os.RemoveAll(filepath.Dir(path))
}

func compile() (path string, err error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "anthropic-oauth-proxy-e2e-")
	if err != nil {
		return "", fmt.Errorf("making a folder for the binary: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()

	path = filepath.Join(dir, "anthropic-oauth-proxy")
	args, cgo := []string{"-trimpath", "-ldflags", "-s -w"}, "CGO_ENABLED=0"
	if Raced() {
		args, cgo = []string{"-race"}, "CGO_ENABLED=1"
	}
	args = append([]string{"build", "-C", root, "-tags", Tags, "-o", path}, args...)
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the proxy in %s: %w\n%s", root, err, out)
	}
	return path, nil
}

// moduleRoot finds the program's module: the parent of the e2e module, in which
// the test or command that asks is running.
func moduleRoot() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("asking go for the e2e module: %w", err)
	}
	root := filepath.Dir(filepath.Dir(strings.TrimSpace(string(out))))
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		return "", fmt.Errorf("finding the proxy's module above the e2e module: %w (run from inside e2e)", err)
	}
	return root, nil
}
