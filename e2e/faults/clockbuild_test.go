//go:build faults

package faults

import (
	_ "embed"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// What is added to package time, and to the program.
var (
	//go:embed overlay/time.go.txt
	stepTime []byte
	//go:embed overlay/main.go.txt
	stepMain []byte
)

// steppable builds the proxy as it is released, but with a wall clock of its own,
// which SIGUSR1 sets forward by an hour and SIGUSR2 back: the machine's is
// nobody's to set in a test.
func (s *scene) steppable() (binary string) {
	s.Helper()
	root := proxytest.Must(exec.Command("go", "env", "GOROOT").Output())(s.T)
	clock := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source := proxytest.Must(os.ReadFile(clock))(s.T)
	const reading = "sec, nsec, mono := runtimeNow()"
	if n := strings.Count(string(source), reading); n != 1 {
		s.Fatalf("%s has %q %d times, want once: this Go needs another way to step the clock", clock, reading, n)
	}
	return proxytest.Must(proxytest.BuildWith(s.TempDir(), map[string][]byte{
		clock: []byte(strings.Replace(string(source), reading, "sec, nsec, mono := steppedNow()", 1)),
		filepath.Join(filepath.Dir(clock), "zz_step.go"): stepTime,
		"zz_step.go": stepMain,
	}, "-ldflags", "-s -w"))(s.T)
}
