package tailnet

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/lockedfile"
	tailscaleroot "tailscale.com"
)

// cacheEnv names the environment variable that overrides where the tailscale programs are kept; the default is
// anthropic-oauth-proxy-e2e in the user's cache directory. Each version has its own folder in it.
const cacheEnv = "E2E_TAILSCALE_CACHE"

// buildTags are those of the official container image, where the sidecar's programs come from.
const buildTags = "ts_kube,ts_package_container"

// programs are what Build builds, from tailscale.com/cmd. The last one is there if all are.
var programs = []string{"tailscale", "containerboot", "tailscaled"}

// Binaries is a folder with tailscaled, tailscale and containerboot, all of the version that e2e/go.mod requires.
type Binaries struct{ dir string }

func (b *Binaries) path(program string) string { return filepath.Join(b.dir, program) }

func (b *Binaries) complete() bool {
	_, err := os.Stat(b.path("tailscaled"))
	return err == nil
}

// Build returns the tailscale programs, building them first if the cache lacks them: that takes minutes, and progress
// tells about it. Several processes may call it at once; one builds and the others wait. It must run inside the e2e
// module, whose go.mod decides the version, and needs the go command.
func Build(ctx context.Context, progress io.Writer) (*Binaries, error) {
	base := os.Getenv(cacheEnv)
	if base == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("finding a cache folder: %w (set %s to a folder)", err, cacheEnv)
		}
		base = filepath.Join(user, "anthropic-oauth-proxy-e2e")
	}
	dir, err := filepath.Abs(filepath.Join(base, "tailscale-"+strings.TrimSpace(tailscaleroot.VersionDotTxt)))
	bin := &Binaries{dir}
	if err == nil && !bin.complete() {
		fmt.Fprintf(progress, "building tailscale in %s, unless another process does; the first time this takes some minutes\n", dir)
		err = bin.build(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("building tailscale (inside the e2e module?): %w", err)
	}
	return bin, nil
}

// build compiles into a temporary folder and then moves each program into place, so that a half-written one is never used.
func (b *Binaries) build(ctx context.Context) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	unlock, err := lockedfile.MutexAt(b.path("build.lock")).Lock()
	if err != nil {
		return err
	}
	defer unlock()
	if b.complete() { // somebody else has built them meanwhile
		return nil
	}
	tmp, err := os.MkdirTemp(b.dir, "build-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-tags=" + buildTags, "-o", tmp + "/"}
	for _, program := range programs {
		args = append(args, "tailscale.com/cmd/"+program)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	for _, program := range programs {
		if err := os.Rename(filepath.Join(tmp, program), b.path(program)); err != nil {
			return err
		}
	}
	return nil
}
