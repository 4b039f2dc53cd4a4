package main

import (
	"bufio"
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/tailnet"
)

func TestMain(m *testing.M) {
	tailnet.MustBuild()
	os.Exit(m.Run())
}

// TestCtrlC runs the demo until it has said what to type and then ends it. What
// it tells to type is run by -once, which needs curl.
func TestCtrlC(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out, demo := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, false, demo, t.Output())
		demo.Close()
		ended <- err
	}()
	said := ""
	for lines := bufio.NewScanner(out); lines.Scan(); {
		said += lines.Text() + "\n"
		if strings.HasPrefix(lines.Text(), "Ctrl-C ends") {
			interrupt()
		}
	}
	if err := <-ended; err != nil || ctx.Err() == nil {
		t.Errorf("the demo ended: %v\n%s", err, said)
	}
	for _, want := range []string{"/v1/messages", "/health", "/metrics"} {
		if !strings.Contains(said, want) {
			t.Errorf("the demo does not tell of %s:\n%s", want, said)
		}
	}
}
