package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestMain builds tailscale before the clock of -timeout starts.
func TestMain(m *testing.M) {
	if _, err := tailnet.Build(context.Background(), os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// TestCtrlC runs the demo until it has said what to type and then ends it. What
// it tells to type is run by -once, which needs curl.
func TestCtrlC(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	var out, progress buffer
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, nil, &out, &progress) }()

	const lastLine = "Ctrl-C ends"
	for !strings.Contains(out.String(), lastLine) {
		select {
		case err := <-ended:
			t.Fatalf("the demo ended before it said %q: %v\n%s%s", lastLine, err, &out, &progress)
		case <-time.After(10 * time.Millisecond):
		}
	}
	for _, want := range []string{"/v1/messages", "/health", "/metrics"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the demo does not tell of %s:\n%s", want, &out)
		}
	}
	interrupt()
	if err := <-ended; err != nil {
		t.Errorf("after Ctrl-C: %v", err)
	}
}

func TestBadCommandLine(t *testing.T) {
	for _, args := range [][]string{{"-twice"}, {"once"}} {
		var progress buffer
		if err := run(t.Context(), args, io.Discard, &progress); err != errUsage {
			t.Errorf("demo %v: %v, want %v", args, err, errUsage)
		}
		if !strings.Contains(progress.String(), "usage: go -C e2e run ./demo") {
			t.Errorf("demo %v does not tell its usage: %s", args, &progress)
		}
	}
}

// buffer is written by the demo and read by the test.
type buffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
