//go:build faults

package main

import (
	"os"
	"os/exec"
	"testing"
	"time"
)

// TestQuota has a busy loop run where it gets half of a processor.
func TestQuota(t *testing.T) {
	dir, err := makeQuota()
	if err != nil {
		t.Fatal(err)
	}
	command := inQuota(dir, []string{"/bin/sh", "-c", "while :; do :; done"})
	cmd := exec.Command(command[0], command[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	used, err := readCPU(cmd.Process.Pid)
	if err != nil || used > 1.4 {
		t.Errorf("used %.2f s in 2 s (%v), want 1", used, err)
	}
	_ = cmd.Process.Kill() // it does not end by itself
	_ = cmd.Wait()
	if err := os.Remove(dir); err != nil {
		t.Error(err)
	}
}

// TestMeasureUnderQuota runs the workload of the quotas for real.
func TestMeasureUnderQuota(t *testing.T) {
	measureAll(t, options{only: []string{limited, limitedOne}, work: []string{quotaName(quotaLoads[0])}, rounds: 1, duration: 200 * time.Millisecond})
}
