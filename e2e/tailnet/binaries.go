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

// Binaries is a folder with tailscaled, tailscale and containerboot, all of the version that e2e/go.mod requires.
type Binaries struct{ dir string }

func (b *Binaries) path(program string) string { return filepath.Join(b.dir, program) }

// Build returns the tailscale programs, building them first if the cache lacks them, with their own go.mod: that takes minutes,
// and progress tells about it. Several processes may call it at once; one builds and the others wait. It needs the go command.
func Build(ctx context.Context, progress io.Writer) (*Binaries, error) {
	base := os.Getenv(cacheEnv)
	if base == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return nil, fmt.Errorf("finding a cache folder: %w (set %s to a folder)", err, cacheEnv)
		}
		base = filepath.Join(user, "anthropic-oauth-proxy-e2e")
	}
	version := strings.TrimSpace(tailscaleroot.VersionDotTxt)
	b := &Binaries{filepath.Join(base, "tailscale-"+version)}
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lockedfile.MutexAt(b.path("build.lock")).Lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	complete := b.path("complete") // or else another process was ended while it built
	if _, err := os.Stat(complete); err == nil {
		return b, nil
	}
	fmt.Fprintf(progress, "building tailscale in %s; the first time this takes some minutes\n", b.dir)
	build := exec.CommandContext(ctx, "go", "install", "-trimpath", "-ldflags=-s -w", "-tags="+buildTags,
		"tailscale.com/cmd/tailscale@v"+version, "tailscale.com/cmd/containerboot@v"+version, "tailscale.com/cmd/tailscaled@v"+version)
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOBIN="+b.dir)
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building tailscale: %w\n%s", err, out)
	}
	return b, os.WriteFile(complete, nil, 0o644)
}

// MustBuild is [Build] for a TestMain: before the clock of -timeout starts. Without the programs it ends the process.
func MustBuild() {
	if _, err := Build(context.Background(), os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
