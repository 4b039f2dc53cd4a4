package proxytest

import (
	"testing"
	"time"
)

// TestUsage has a child of a process burn processor time.
func TestUsage(t *testing.T) {
	p := Launch(t, Options{Binary: "/bin/sh", Args: []string{"-c", "trap 'kill $!' TERM; while :; do :; done & wait"}})
	Eventually(t, "0.2 s of processor time", func() bool {
		used, err := p.CPU()
		if took := time.Since(p.Started); err != nil || used > took+100*time.Millisecond {
			t.Fatalf("one busy process used %v in %v, error %v", used, took, err)
		}
		return used >= 200*time.Millisecond
	})
	if rss, pss, err := p.Memory(); err != nil || pss < 100<<10 || pss > rss {
		t.Errorf("RSS %d, PSS %d bytes, error %v: want some, and PSS not above RSS", rss, pss, err)
	}
}
