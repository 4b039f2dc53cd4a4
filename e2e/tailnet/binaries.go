package tailnet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	tailscaleroot "tailscale.com"
)

// CacheEnv names the environment variable that overrides where the tailscale
// programs are kept; the default is anthropic-oauth-proxy-e2e in the user's
// cache directory. Each version has its own folder in it.
const CacheEnv = "E2E_TAILSCALE_CACHE"

// buildTags are those of the official container image, where the sidecar's
// programs come from.
const buildTags = "ts_kube,ts_package_container"

// Version is the version of tailscale that e2e/go.mod requires.
func Version() string { return strings.TrimSpace(tailscaleroot.VersionDotTxt) }

// Binaries is a folder with the programs of one tailscale version.
type Binaries struct {
	// Dir holds tailscaled, tailscale and containerboot.
	Dir string
}

// programs are what Build builds, from tailscale.com/cmd.
var programs = []string{"tailscaled", "tailscale", "containerboot"}

func (b *Binaries) path(program string) string { return filepath.Join(b.Dir, program) }

// complete reports whether every program is there.
func (b *Binaries) complete() bool {
	for _, program := range programs {
		if _, err := os.Stat(b.path(program)); err != nil {
			return false
		}
	}
	return true
}

// Build returns the tailscale programs, building them first if the cache lacks
// them: that takes minutes, and progress tells about it. Several processes may
// call it at once; one builds and the others wait. It must run inside the e2e
// module, whose go.mod decides the version, and needs the go command.
func Build(ctx context.Context, progress io.Writer) (*Binaries, error) {
	dir, err := cacheDir()
	if err != nil {
		return nil, err
	}
	bin := &Binaries{Dir: dir}
	if bin.complete() {
		return bin, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the cache folder of the tailscale programs: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(dir, "build.lock"), progress)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if bin.complete() { // somebody else has built them meanwhile
		return bin, nil
	}
	fmt.Fprintf(progress, "building tailscale v%s into %s; the first time this takes some minutes\n", Version(), dir)
	start := time.Now()
	if err := bin.build(ctx); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "built tailscale in %v\n", time.Since(start).Round(time.Second))
	return bin, nil
}

func cacheDir() (string, error) {
	base := os.Getenv(CacheEnv)
	if base == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("finding a cache folder: %w (set %s to a folder)", err, CacheEnv)
		}
		base = filepath.Join(user, "anthropic-oauth-proxy-e2e")
	}
	return filepath.Abs(filepath.Join(base, "tailscale-"+Version()))
}

// lockFile waits for the lock on a file and returns how to release it. The
// kernel releases the lock of a process that dies.
func lockFile(ctx context.Context, path string, progress io.Writer) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the build lock: %w", err)
	}
	tryLock := func() bool {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		return !errors.Is(err, syscall.EWOULDBLOCK)
	}
	if !tryLock() {
		fmt.Fprintln(progress, "waiting for another process that builds tailscale")
		if ctxErr := poll(ctx, tryLock); ctxErr != nil {
			err = ctxErr
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// build compiles into a temporary folder and then moves each program into
// place, so that a half-written one is never used.
func (b *Binaries) build(ctx context.Context) error {
	tmp, err := os.MkdirTemp(b.Dir, "build-")
	if err != nil {
		return fmt.Errorf("making a build folder: %w", err)
	}
	defer os.RemoveAll(tmp)

	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-tags=" + buildTags, "-o", tmp + "/"}
	for _, program := range programs {
		args = append(args, "tailscale.com/cmd/"+program)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building tailscale (inside the e2e module?): %w\n%s", err, out)
	}
	var errs []error
	for _, program := range programs {
		errs = append(errs, os.Rename(filepath.Join(tmp, program), b.path(program)))
	}
	return errors.Join(errs...)
}
