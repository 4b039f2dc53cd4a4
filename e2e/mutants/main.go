// Command mutants measures what the tests notice: it changes the program in one place at a time and runs tests until one fails. A
// change that none notices has survived: it is code that nothing needs, a promise without a test, or a change that makes no
// difference.
//
//	go -C e2e run ./mutants                   200 changes over all files; takes an hour
//	go -C e2e run ./mutants -n 30 conn.go     30 changes of one file
//
// The unit tests are asked first, then those of the built program, then, as root, the faults. The same code gets the same
// changes, so that the score of two versions of the tests can be compared.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// defaultFiles are those in which a wrong line costs a user something.
var defaultFiles = []string{
	"admission.go", "body.go", "config.go", "conn.go", "failure.go", "headers.go", "health.go", "log.go", "pool.go", "proxy.go",
	"proxyproto.go", "tailnet.go", "toml.go", "upstream.go", "watch.go",
}

// A suite is tests that may notice a change.
type suite struct {
	name string
	dir  string
	args []string
}

// suites are asked in this order, until one notices.
var suites = []suite{
	{"unit", "..", []string{"-timeout", "2m", "."}},
	{"e2e", ".", []string{"-timeout", "4m", ".", "./oracles"}},
	{"faults", ".", []string{"-timeout", "8m", "-tags", "faults", "-parallel", "12", "./faults"}},
}

// atOnce is how many changes are tested at once.
const atOnce = 2

func main() {
	n := flag.Int("n", 200, "`changes` over all files, in proportion to what can be changed")
	flag.Parse()
	if os.Geteuid() != 0 {
		suites = suites[:2]
	}
	files := flag.Args()
	if len(files) == 0 {
		files = defaultFiles
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *n, files); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// run makes n changes in the files of the program and prints what becomes of each, and the score.
func run(ctx context.Context, n int, files []string) error {
	all, total := map[string][]mutant{}, 0
	for _, file := range files {
		mutants, err := mutantsOf(file)
		if err != nil {
			return err
		}
		all[file] = mutants
		total += len(mutants)
	}
	if who, said := ask(ctx, nil); who != "" {
		return fmt.Errorf("without any change, %s fails:\n%s", who, said)
	}
	var mu sync.Mutex
	notices, tried := map[string]int{}, 0 // by suite
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, mutants := range all {
		queue := make(chan mutant, len(mutants))
		for _, m := range mutants {
			queue <- m
		}
		close(queue)
		for range max(1, (n*len(mutants)+total/2)/total) {
			group.Go(func() error {
				for m := range queue { // some don't compile; the next ones in line take their places
					start := time.Now()
					who, err := try(ctx, m)
					if errors.Is(err, errCompile) && ctx.Err() == nil {
						continue
					}
					if err != nil || ctx.Err() != nil {
						return cmp.Or(err, ctx.Err())
					}
					mu.Lock()
					defer mu.Unlock()
					tried++
					notices[who]++
					fmt.Printf("%-8s %s (%.0f s)\n", who, m.what, time.Since(start).Seconds())
					return nil
				}
				return nil
			})
		}
	}
	if err := group.Wait(); err != nil {
		return err
	}
	fmt.Printf("\n%d changes: %v\nscore %.1f %%\n", tried, notices, 100*float64(tried-notices[survived])/float64(tried))
	return nil
}

// survived stands for the suite that notices what none does.
const survived = "SURVIVED"

// errCompile says that there is no program with the change.
var errCompile = errors.New("it does not compile")

// try returns the suite that notices m. The tree is never written to: go takes the changed file by -overlay.
func try(ctx context.Context, m mutant) (notices string, err error) {
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	file, overlay := filepath.Join(dir, filepath.Base(m.file)), filepath.Join(dir, "overlay.json")
	index, _ := json.Marshal(map[string]map[string]string{"Replace": {m.file: file}})
	if err := errors.Join(os.WriteFile(file, m.source, 0o644), os.WriteFile(overlay, index, 0o644)); err != nil {
		return "", err
	}
	env := []string{"GOFLAGS=-overlay=" + overlay}
	if command(ctx, env, "..", "vet", ".").Run() != nil {
		return "", errCompile
	}
	who, _ := ask(ctx, env)
	return cmp.Or(who, survived), nil
}

// alone runs the faults, whose network namespaces have names, one at a time.
var alone sync.Mutex

// ask runs the suites, and returns the first that fails and what it said.
func ask(ctx context.Context, env []string) (noticed, said string) {
	for _, s := range suites {
		if s.name == "faults" {
			alone.Lock()
			defer alone.Unlock()
		}
		cmd := command(ctx, env, s.dir, append([]string{"test", "-count=1", "-failfast"}, s.args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			return s.name, string(out)
		}
	}
	return "", ""
}

func command(ctx context.Context, env []string, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	return cmd
}
