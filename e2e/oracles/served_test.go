// Package oracles holds what the program parses and encodes against well-kept libraries that do the same.
package oracles

import (
	"cmp"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// served is the test binary of package main as a server: see TestMain there.
type served struct {
	requests  *json.Encoder
	responses *json.Decoder
}

// startServed runs the server until the test ends.
func startServed(t testing.TB) *served {
	t.Helper()
	cmd := exec.Command(proxytest.Must(proxytest.BuildTests())(t))
	cmd.Env = append(os.Environ(), "SERVE_E2E=1")
	cmd.Stderr = os.Stderr
	stdin := proxytest.Must(cmd.StdinPipe())(t)
	stdout := proxytest.Must(cmd.StdoutPipe())(t)
	proxytest.Check(t, cmd.Start())
	t.Cleanup(func() { proxytest.Check(t, errors.Join(stdin.Close(), cmd.Wait())) })
	return &served{json.NewEncoder(stdin), json.NewDecoder(stdout)}
}

// ask sends a request and stores its response. That there is none is fatal to the test: the server's output tells why.
func (s *served) ask(t testing.TB, request, response any) {
	t.Helper()
	if err := cmp.Or(s.requests.Encode(request), s.responses.Decode(response)); err != nil {
		t.Fatalf("the test binary of package main was asked %.1000q: %v", request, err)
	}
}

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }
