// Package oracles holds what the program parses and encodes against well-kept libraries that do the same.
package oracles

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting the test binary of package main: %v", err)
	}
	t.Cleanup(func() {
		if err := errors.Join(stdin.Close(), cmd.Wait()); err != nil {
			t.Errorf("stopping the test binary of package main: %v", err)
		}
	})
	return &served{json.NewEncoder(stdin), json.NewDecoder(stdout)}
}

// ask sends a request and stores its response.
func (s *served) ask(request, response any) error {
	if err := s.requests.Encode(request); err != nil {
		return fmt.Errorf("writing to the test binary of package main: %w", err)
	}
	if err := s.responses.Decode(response); err == io.EOF {
		return errors.New("the test binary of package main has ended: its output above tells why")
	} else if err != nil {
		return fmt.Errorf("reading from the test binary of package main: %w", err)
	}
	return nil
}

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }
