package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"

	"github.com/google/pprof/profile"
)

// TestProfile shows that default.pgo, which the compiler optimises the program by,
// is of the program as it is: a profile of functions that are gone optimises nothing.
func TestProfile(t *testing.T) {
	t.Parallel()
	file := proxytest.Must(os.Open("../default.pgo"))(t)
	defer file.Close()
	profiled := proxytest.Must(profile.Parse(file))(t)
	var declared []string
	for _, path := range proxytest.Must(filepath.Glob("../*.go"))(t) {
		if !strings.HasSuffix(path, "_test.go") {
			declared = append(declared, functions(t, path)...)
		}
	}
	seen := 0
	for _, f := range profiled.Function {
		name, ours := strings.CutPrefix(f.Name, "main.")
		if !ours || strings.HasPrefix(name, "init") {
			continue
		}
		// What stands in a function has a name that begins with its: (*proxy).serve.func1, find-range1.
		parts := strings.FieldsFunc(name, func(c rune) bool { return strings.ContainsRune("(*).-", c) })
		function, method := parts[0], strings.Join(parts[:min(2, len(parts))], ".")
		if seen++; !slices.Contains(declared, function) && !slices.Contains(declared, method) && !strings.HasPrefix(name, "bench") {
			t.Errorf("default.pgo has %s, which the program no longer has: run go -C e2e run ./bench -cpuprofile ../default.pgo", f.Name)
		}
	}
	if seen < 20 {
		t.Errorf("default.pgo has %d functions of the program, want 20 at least: it is of another program", seen)
	}
}
