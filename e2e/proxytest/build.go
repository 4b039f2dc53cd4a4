package proxytest

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

// Tags are the build tags of every release build; they leave parts of the tailscale client out that the proxy never calls.
const Tags = "ts_omit_debugeventbus,ts_omit_syspolicy"

// folder has what is built on the first demand, once per process.
var folder = sync.OnceValues(func() (string, error) { return os.MkdirTemp("", "anthropic-oauth-proxy-e2e-") })

var (
	released = sync.OnceValues(func() (string, error) { return build("released", "CGO_ENABLED=0", "-trimpath", "-ldflags", "-s -w") })
	raced    = sync.OnceValues(func() (string, error) { return build("raced", "CGO_ENABLED=1", "-race") })
	tests    = sync.OnceValues(func() (string, error) {
		if path := os.Getenv(testsEnv); path != "" {
			return path, nil
		}
		path, err := inFolder("tests")
		return path, errors.Join(err, compile(path, "CGO_ENABLED=0", "test", "-c", "-trimpath"), os.Setenv(testsEnv, path))
	})
)

// testsEnv tells the processes that a fuzz target starts what [BuildTests] returned to it: their time is for fuzzing.
const testsEnv = "E2E_TESTS"

// Build compiles the program from the parent module, once per process, and returns the binary's path. It is built as it is
// released, unless the environment has E2E_RACE=1: then it is that of [BuildRaced]. [Cleanup] removes it.
func Build() (string, error) {
	if Raced() {
		return raced()
	}
	return released()
}

// BuildRaced is [Build] with the race detector, which needs cgo and makes the program larger and slower.
func BuildRaced() (string, error) { return raced() }

// BuildTests compiles the program's unit tests, once, as [Build] does the program.
func BuildTests() (string, error) { return tests() }

// Raced reports whether [Build] adds the race detector, so that tests of size
// and speed can tell that theirs is not the released program.
func Raced() bool { return os.Getenv("E2E_RACE") == "1" }

// Cleanup removes what the builds left behind. Call it last: a process that still
// runs is not harmed, one that is started later is not found.
func Cleanup() error {
	dir, err := folder()
	return errors.Join(err, os.RemoveAll(dir))
}

// BuildWith builds the program as it is released, in dir, with files that stand in for its own or Go's, or are added to them (go
// build -overlay): their contents by path, which is relative to the program's module if it is not absolute. Flags are more
// arguments of go build.
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
	return path, compile(path, "CGO_ENABLED=0", append([]string{"build", "-trimpath", "-overlay", overlay}, flags...)...)
}

// build compiles the program under this name in folder.
func build(name, cgo string, flags ...string) (path string, err error) {
	if path, err = inFolder(name + "-anthropic-oauth-proxy"); err != nil {
		return "", err
	}
	return path, compile(path, cgo, append([]string{"build"}, flags...)...)
}

func inFolder(name string) (string, error) {
	dir, err := folder()
	if err != nil {
		return "", fmt.Errorf("making a folder for the binary: %w", err)
	}
	return filepath.Join(dir, name), nil
}

// compile runs this command of go for the program's module, with an environment that has env too.
func compile(path, env string, command ...string) error {
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	cmd := exec.Command("go", append([]string{"-C", root}, append(command, "-tags", Tags, "-o", path, ".")...)...)
	cmd.Env = append(os.Environ(), env)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the proxy in %s: %w\n%s", root, err, out)
	}
	return nil
}

// moduleRoot finds the program's module: the parent of the e2e module, in which the test or command that asks is running.
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
