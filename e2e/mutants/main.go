// Command mutants measures what the tests notice: it changes the program in one
// place at a time and runs tests until one fails. A change that none notices has
// survived: it is code that nothing needs, a promise without a test, or a change
// that makes no difference.
//
//	go -C e2e run ./mutants                   200 changes over all files; takes an hour
//	go -C e2e run ./mutants -n 30 conn.go     30 changes of one file
//
// The unit tests are asked first, then those of the built program, then, as root,
// the faults. The same code gets the same changes, so that the score of two
// versions of the tests can be compared.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// defaultFiles are those in which a wrong line costs a user something.
var defaultFiles = []string{"admission.go", "body.go", "config.go", "conn.go", "failure.go", "headers.go", "health.go", "log.go", "pool.go", "proxy.go", "proxyproto.go", "tailnet.go", "toml.go", "upstream.go", "watch.go"}

// suites are asked in this order, until one notices.
var suites = []struct {
	name string
	dir  string
	args []string
}{
	{"unit", ".", []string{"test", "-count=1", "-failfast", "-timeout", "2m", "."}},
	{"e2e", "e2e", []string{"test", "-count=1", "-failfast", "-timeout", "4m", "."}},
	{"faults", "e2e", []string{"test", "-count=1", "-failfast", "-timeout", "8m", "-tags", "faults", "-parallel", "12", "./faults"}},
}

func main() {
	n := flag.Int("n", 200, "`changes` over all files, in proportion to what can be changed")
	deep := flag.Int("suites", len(suites), "how many `suites` to ask: 1 unit, 2 and e2e, 3 and faults (needs root)")
	at := flag.Int("j", 2, "`changes` that are tested at once")
	only := flag.String("only", "", "only changes whose description contains this `text`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *n, *deep, *at, *only, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// run makes n changes in the files of the program and prints what becomes of each, and the score.
func run(ctx context.Context, n, deep, at int, only string, files []string) error {
	root, err := filepath.Abs("..")
	if err != nil {
		return err
	}
	if len(files) == 0 {
		files = defaultFiles
	}
	all, total := map[string][]mutant{}, 0
	for _, file := range files {
		if all[file], err = mutantsOf(filepath.Join(root, file)); err != nil {
			return err
		}
		total += len(all[file])
	}
	tests := &tester{root: root, deep: deep}
	if who, said := tests.ask(ctx, nil); who != "" {
		return fmt.Errorf("without any change, %s fails:\n%s", who, said)
	}
	scores := map[string]*score{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	places := make(chan struct{}, at)
	for _, file := range files {
		s := &score{}
		scores[file] = s
		// Some don't compile; the next ones in line take their places.
		wanted := max(1, (n*len(all[file])+total/2)/total)
		queue := make(chan mutant, len(all[file]))
		for _, m := range all[file] {
			if strings.Contains(m.String(), only) {
				queue <- m
			}
		}
		close(queue)
		for range wanted {
			wg.Go(func() {
				places <- struct{}{}
				defer func() { <-places }()
				for m := range queue {
					if ctx.Err() != nil {
						return
					}
					start := time.Now()
					noticed, compiles := tests.try(ctx, m)
					if !compiles {
						continue
					}
					mu.Lock()
					defer mu.Unlock()
					s.add(noticed)
					fmt.Printf("%-8s %s (%.0f s)\n", cmp.Or(noticed, "SURVIVED"), m, time.Since(start).Seconds())
					return
				}
			})
		}
	}
	wg.Wait()
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	var sum score
	fmt.Printf("\n%-14s %8s %8s %8s %8s\n", "file", "changes", "unit", "noticed", "survived")
	for _, file := range files {
		fmt.Printf("%-14s %s\n", file, scores[file])
		sum.tried, sum.unit, sum.survived = sum.tried+scores[file].tried, sum.unit+scores[file].unit, sum.survived+scores[file].survived
	}
	fmt.Printf("%-14s %s\nscore %.1f %%\n", "all", &sum, 100*float64(sum.tried-sum.survived)/float64(sum.tried))
	return nil
}

// score counts what became of a file's changes.
type score struct{ tried, unit, survived int }

func (s *score) add(noticed string) {
	s.tried++
	switch noticed {
	case "":
		s.survived++
	case suites[0].name:
		s.unit++
	}
}

func (s *score) String() string {
	return fmt.Sprintf("%8d %8d %8d %8d", s.tried, s.unit, s.tried-s.survived, s.survived)
}

// tester runs the suites on a changed program. The tree is never written to: go takes the changed file by -overlay.
type tester struct {
	root  string
	deep  int
	alone sync.Mutex // of the faults, whose network namespaces have names
}

// try returns the suite that notices m, "" if none does. compiles is false if there is no such program.
func (t *tester) try(ctx context.Context, m mutant) (noticed string, compiles bool) {
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return err.Error(), true
	}
	defer os.RemoveAll(dir)
	file, overlay := filepath.Join(dir, filepath.Base(m.file)), filepath.Join(dir, "overlay.json")
	index, _ := json.Marshal(map[string]map[string]string{"Replace": {m.file: file}})
	if err := errors.Join(os.WriteFile(file, m.source(), 0o644), os.WriteFile(overlay, index, 0o644)); err != nil {
		return err.Error(), true
	}
	env := []string{"GOFLAGS=-overlay=" + overlay}
	if err := t.command(ctx, ".", env, "vet", ".").Run(); err != nil {
		return "", false
	}
	noticed, _ = t.ask(ctx, env)
	return noticed, true
}

// ask runs the suites, and returns the first that fails and what it said.
func (t *tester) ask(ctx context.Context, env []string) (noticed, said string) {
	for i, suite := range suites[:t.deep] {
		if i == len(suites)-1 {
			t.alone.Lock()
			defer t.alone.Unlock()
		}
		if out, err := t.command(ctx, suite.dir, env, suite.args...).CombinedOutput(); err != nil {
			return suite.name, string(out)
		}
	}
	return "", ""
}

func (t *tester) command(ctx context.Context, dir string, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = filepath.Join(t.root, dir)
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

// order sorts mutants as if drawn by lot, though always the same: by a hash of what they are.
func order(all []mutant) {
	lot := func(m mutant) uint64 {
		h := fnv.New64a()
		fmt.Fprint(h, m.file[strings.LastIndexByte(m.file, '/'):], m.line(), m.kind, m.now)
		return h.Sum64()
	}
	slices.SortStableFunc(all, func(a, b mutant) int { return cmp.Compare(lot(a), lot(b)) })
}
