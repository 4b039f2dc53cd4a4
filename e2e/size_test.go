package e2e

import (
	"os"
	"slices"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestSize keeps the program as small as it was promised to be on this kind of machine: 8.0 MB, and 0.4 more for a profile that
// pays. (The race detector's build is another program.)
func TestSize(t *testing.T) {
	t.Parallel()
	path := proxytest.Must(proxytest.Build())(t)
	info := proxytest.Must(os.Stat(path))(t)
	t.Logf("%d bytes", info.Size())
	if limit := int64(8_400_000); info.Size() > limit && !proxytest.Raced() {
		t.Errorf("the binary has %d bytes, want at most %d", info.Size(), limit)
	}
}

// TestStartAndIdle measures how long the proxy takes to listen, and what memory
// it then holds. It is not parallel: other tests would be measured too.
func TestStartAndIdle(t *testing.T) {
	var starts []time.Duration
	var memory []int64
	for range 9 {
		p := proxytest.Launch(t, proxytest.Options{Args: proxytest.Serve("https://127.0.0.1:1")}) // to which it does not connect
		proxytest.Check(t, p.WaitListening(proxytest.Timeout))
		starts = append(starts, time.Since(p.Started).Round(100*time.Microsecond))
		proxytest.Check(t, p.WaitRunning(proxytest.Timeout))
		rss := proxytest.Must(p.RSS())(t)
		memory = append(memory, rss>>10)
		proxytest.Check(t, p.Stop())
	}
	slices.Sort(starts)
	slices.Sort(memory)
	t.Logf("listening after %v (median %v)", starts, starts[len(starts)/2])
	t.Logf("idle memory in KiB %v (median %d)", memory, memory[len(memory)/2])
	if proxytest.Raced() {
		return // the detector's costs are not the program's
	}
	// The best of them, as the others measure the machine's other work.
	if starts[0] > 50*time.Millisecond {
		t.Errorf("listening after %v at best, want 50ms", starts[0])
	}
	if limit := int64(32 << 10); memory[0] > limit {
		t.Errorf("idle memory %d KiB, want at most the %d that the pod requests", memory[0], limit)
	}
}
