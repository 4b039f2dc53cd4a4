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

// Each build is made on the first demand only.
var (
	buildReleased = sync.OnceValues(func() (string, error) { return compile(false) })
	buildRaced    = sync.OnceValues(func() (string, error) { return compile(true) })
)

// Build compiles the program from the parent module, once per process, and
// returns the binary's path. It is built as it is released, unless the
// environment has E2E_RACE=1: then it is that of [BuildRaced]. [Cleanup] removes it.
func Build() (string, error) {
	if Raced() {
		return buildRaced()
	}
	return buildReleased()
}

// BuildRaced is [Build] with the race detector, which needs cgo and makes the
// program larger and slower.
func BuildRaced() (string, error) { return buildRaced() }

// Raced reports whether [Build] adds the race detector, so that tests of size
// and speed can tell that theirs is not the released program.
func Raced() bool { return os.Getenv("E2E_RACE") == "1" }

// built are the folders of the builds so far.
var built struct {
	sync.Mutex
	dirs []string
}

// Cleanup removes what the builds left behind. Call it last: a process that still
// runs is not harmed, one that is started later is not found.
func Cleanup() error {
	built.Lock()
	defer built.Unlock()
	var errs []error
	for _, dir := range built.dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

func compile(race bool) (path string, err error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp("", "anthropic-oauth-proxy-e2e-")
	if err != nil {
		return "", fmt.Errorf("making a folder for the binary: %w", err)
	}
	built.Lock()
	built.dirs = append(built.dirs, dir)
	built.Unlock()

	path = filepath.Join(dir, "anthropic-oauth-proxy")
	args, cgo := []string{"-trimpath", "-ldflags", "-s -w"}, "CGO_ENABLED=0"
	if race {
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
