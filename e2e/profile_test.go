package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/pprof/profile"
)

// TestProfile shows that default.pgo, which the compiler optimises the program by,
// is of the program as it is: a profile of functions that are gone optimises nothing.
func TestProfile(t *testing.T) {
	t.Parallel()
	file, err := os.Open("../default.pgo")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	profiled, err := profile.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	declared := declaredFunctions(t)
	seen := 0
	for _, f := range profiled.Function {
		name, ours := strings.CutPrefix(f.Name, "main.")
		if !ours || strings.HasPrefix(name, "init") {
			continue
		}
		// What stands in a function has a name that begins with its: (*proxy).serve.func1, find-range1.
		parts := strings.FieldsFunc(name, func(c rune) bool { return strings.ContainsRune("(*).-", c) })
		function, method := parts[0], strings.Join(parts[:min(2, len(parts))], ".")
		if seen++; !declared[function] && !declared[method] && !strings.HasPrefix(name, "bench") {
			t.Errorf("default.pgo has %s, which the program no longer has: run go -C e2e run ./bench -cpuprofile ../default.pgo", f.Name)
		}
	}
	if seen < 20 {
		t.Errorf("default.pgo has %d functions of the program, want 20 at least: it is of another program", seen)
	}
}

var declaration = regexp.MustCompile(`(?m)^func (?:\(\w+ \*?(\w+)\) )?(\w+)`)

// declaredFunctions returns the names of the program's functions and, behind that of
// their type and a dot, methods.
func declaredFunctions(t *testing.T) map[string]bool {
	t.Helper()
	files, err := filepath.Glob("../*.go")
	if err != nil {
		t.Fatal(err)
	}
	declared := map[string]bool{}
	for _, name := range files {
		source, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range declaration.FindAllStringSubmatch(string(source), -1) {
			declared[strings.TrimPrefix(f[1]+"."+f[2], ".")] = !strings.HasSuffix(name, "_test.go")
		}
	}
	return declared
}
