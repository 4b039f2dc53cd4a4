package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/pprof/profile"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// profileSource is added to the program in profiled builds.
//
//go:embed overlay/profile.go.txt
var profileSource []byte

// profile writes a pprof CPU profile of the proxy under load, which serves as default.pgo.
func (b *testbed) profile(ctx context.Context, o options) (err error) {
	c := contestants[0]
	if c.binary, err = proxytest.BuildWith(b.dir, map[string][]byte{"zz_profile.go": profileSource}); err != nil {
		return err
	}
	raw := filepath.Join(b.dir, "profile")
	t, err := b.start(c, "BENCH_FILE="+raw)
	if err != nil {
		return err
	}
	defer func() { err = t.stop(err) }()
	if o.work == nil {
		o.work = []string{"small32", "streams500"} // what the proxy is there for
	}
	for range o.rounds {
		for _, w := range o.workloads() {
			if _, err := t.run(ctx, w, o.duration); err != nil {
				return err
			}
		}
	}
	if err := t.process.Signal(syscall.SIGUSR1); err != nil {
		return err
	}
	if code, err := t.process.Wait(proxytest.Timeout); err != nil || code != 0 {
		return fmt.Errorf("waiting for the profile: exit code %d, error %v", code, err)
	}
	written, errRead := os.ReadFile(raw)
	parsed, err := profile.ParseData(written)
	if err := cmp.Or(errRead, err); err != nil {
		return err
	}
	for _, m := range parsed.Mapping {
		m.File = filepath.Base(m.File) // where this machine had the program is of no use to others
	}
	var out bytes.Buffer
	return errors.Join(parsed.Write(&out), os.WriteFile(o.profile, out.Bytes(), 0o644))
}
