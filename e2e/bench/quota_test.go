//go:build faults

package main

import (
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestQuota has a busy loop run where it gets half of a processor.
func TestQuota(t *testing.T) {
	p := proxytest.Launch(t, proxytest.Options{Binary: "/bin/sh", Args: []string{"-c", "while :; do :; done"}, CPUs: quotaCPUs})
	time.Sleep(2 * time.Second)
	if used, err := p.CPU(); err != nil || used > 1400*time.Millisecond {
		t.Errorf("used %v in 2 s (%v), want 1 s", used, err)
	}
}

// TestMeasureUnderQuota runs the workload of the quotas for real.
func TestMeasureUnderQuota(t *testing.T) {
	measureAll(t, options{only: []string{limitedOne, limited}, work: []string{"quota50"}})
}
