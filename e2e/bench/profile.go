package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/pprof/profile"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// profileSource is added to the program in profiled builds.
//
//go:embed overlay/profile.go.txt
var profileSource []byte

// profiled is a profiled build of the proxy that runs.
type profiled struct {
	*target
	dir  string // of the build
	file string // that it writes
}

// startProfiled builds and starts it; variable names the kind of profile. What it
// returns has to be closed, unless there is an error.
func startProfiled(o options, up *upstream, variable string) (*profiled, error) {
	dir, err := os.MkdirTemp("", "bench-profile-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the profiled build: %w", err)
	}
	p := &profiled{dir: dir, file: filepath.Join(dir, "profile")}
	c := all()[0]
	if c.binary, err = proxytest.BuildWith(dir, map[string][]byte{"zz_profile.go": profileSource}); err == nil {
		p.target, err = start(c, up, append(slices.Clone(o.env), variable+"="+p.file))
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return p, nil
}

func (p *profiled) close() error { return errors.Join(p.stop(), os.RemoveAll(p.dir)) }

func (p *profiled) signal() error { return p.cmd.Process.Signal(syscall.SIGUSR1) }

// written waits for the profile and returns it; the file is gone then.
func (p *profiled) written() ([]byte, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		content, err := os.ReadFile(p.file)
		switch {
		case err == nil:
			return content, os.Remove(p.file)
		case !errors.Is(err, os.ErrNotExist):
			return nil, err
		case time.Now().After(deadline):
			return nil, p.explain(fmt.Errorf("no profile after %v", patience))
		}
	}
}

// profiledWork is what the proxy is there for, and profiled under: small requests
// and event streams.
var profiledWork = []string{"small32", streamsName(500)}

// profileCPU writes a CPU profile of the proxy under profiledWork, or what o asks
// for. It serves as default.pgo.
func profileCPU(ctx context.Context, o options, up *upstream) (err error) {
	p, err := startProfiled(o, up, "BENCH_CPUPROFILE")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	if err := p.signal(); err != nil {
		return err
	}
	if o.work == nil {
		o.work = profiledWork
	}
	for range o.rounds {
		for _, w := range chosenWorkloads(o) {
			if _, err := w.run(ctx, p.target, o.duration); err != nil {
				return p.explain(err)
			}
		}
	}
	if err := p.signal(); err != nil {
		return err
	}
	written, err := p.written()
	if err != nil {
		return err
	}
	parsed, err := profile.ParseData(written)
	if err != nil {
		return err
	}
	for _, m := range parsed.Mapping {
		m.File = filepath.Base(m.File) // where this machine had the program is of no use to others
	}
	var out bytes.Buffer
	if err := parsed.Write(&out); err != nil {
		return err
	}
	return os.WriteFile(o.cpuProfile, out.Bytes(), 0o644)
}

// counts are numbers of allocated objects, by owner and place.
type counts map[string]map[string]int64

// countAllocs prints how many objects the proxy allocates for one small request,
// by owner: "main" is the program, together with what other packages do for it.
func countAllocs(ctx context.Context, o options, up *upstream, stdout io.Writer) (err error) {
	p, err := startProfiled(o, up, "BENCH_ALLOCS")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()

	clients, err := connect(ctx, p.target, 4)
	defer func() {
		for _, c := range clients {
			c.conn.Close()
		}
	}()
	if err != nil {
		return err
	}
	if _, err := runLap(p.target, clients, small(len(clients)), o.duration); err != nil {
		return p.explain(err)
	}
	before, err := p.counts()
	if err != nil {
		return err
	}
	l, err := runLap(p.target, clients, small(len(clients)), o.duration)
	if err != nil {
		return p.explain(err)
	}
	after, err := p.counts()
	if err != nil {
		return err
	}
	return printAllocs(stdout, before, after, len(l.latencies))
}

func (p *profiled) counts() (counts, error) {
	if err := p.signal(); err != nil {
		return nil, err
	}
	content, err := p.written()
	if err != nil {
		return nil, err
	}
	var c counts
	if err := json.Unmarshal(content, &c); err != nil {
		return nil, fmt.Errorf("reading the allocations: %w", err)
	}
	return c, nil
}

// allocLimit is how many allocations of a small request are to be the program's.
const allocLimit = 12

// printAllocs prints what was allocated between two counts per request; places
// that allocate less than once in 20 requests are left out.
func printAllocs(out io.Writer, before, after counts, requests int) error {
	const rare = 0.05
	var b strings.Builder
	fmt.Fprintf(&b, "allocations per small request, from %d of them; at most %d are to be main's\n", requests, allocLimit)
	for _, owner := range slices.Sorted(maps.Keys(after)) {
		if owner == "main.bench" {
			continue // the count's own
		}
		per := map[string]float64{}
		sum := 0.0
		for place, n := range after[owner] {
			per[place] = float64(n-before[owner][place]) / float64(requests)
			sum += per[place]
		}
		fmt.Fprintf(&b, "\n%-8s %6.1f\n", owner, sum)
		byCount := func(x, y string) int { return cmp.Or(cmp.Compare(per[y], per[x]), cmp.Compare(x, y)) }
		for _, place := range slices.SortedFunc(maps.Keys(per), byCount) {
			if per[place] >= rare {
				fmt.Fprintf(&b, "         %6.1f  %s\n", per[place], place)
			}
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}
