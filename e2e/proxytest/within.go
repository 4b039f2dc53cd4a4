package proxytest

import (
	"testing"
	"time"
)

// Within is [Eventually] with a limit of its own, for what may take longer than [Timeout].
func Within(t testing.TB, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for ; !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(start) > limit {
			t.Fatalf("after %v still not: %s", limit, what)
		}
	}
	return time.Since(start)
}
