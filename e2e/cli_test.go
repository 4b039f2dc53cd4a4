package e2e

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestCLI runs the command lines of testdata/script. (The unit tests know all of what is refused, and in which words.)
func TestCLI(t *testing.T) {
	t.Parallel()
	binary := proxytest.Must(proxytest.Build())(t)
	busy := proxytest.Must(net.Listen("tcp", "127.0.0.1:0"))(t)
	t.Cleanup(func() { busy.Close() })
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("BUSY", busy.Addr().String())
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits CODE proxy ARG… runs the program, which is to end with that code.
			"exits": func(ts *testscript.TestScript, _ bool, args []string) {
				code, exit := 0, new(exec.ExitError)
				if err := ts.Exec(binary, args[2:]...); errors.As(err, &exit) {
					code = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if want, err := strconv.Atoi(args[0]); err != nil || code != want {
					ts.Fatalf("exit code %d, want %s", code, args[0])
				}
			},
		},
	})
}

// TestTerminal: who tries it out by hand reads at once where it listens, and what to type. Pipes get what they are
// promised, and no more (TestRunServes).
func TestTerminal(t *testing.T) {
	t.Parallel()
	binary := proxytest.Must(proxytest.Build())(t)
	ctx, cancel := context.WithTimeout(t.Context(), proxytest.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "script", "-qec", binary+" -local -listen 127.0.0.1:0", "/dev/null") // util-linux's: a terminal
	out := proxytest.Must(cmd.StdoutPipe())(t)
	proxytest.Check(t, cmd.Start())
	defer cmd.Wait()
	defer cancel()
	lines := bufio.NewScanner(out)
	for range 3 {
		if lines.Scan() && strings.Contains(lines.Text(), "it listens on 127.0.0.1:0; in another terminal, type ANTHROPIC_BASE_URL=http://127.0.0.1:0 claude") {
			return
		}
	}
	t.Error("the first three lines do not say it")
}
