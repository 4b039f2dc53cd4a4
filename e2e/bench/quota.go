package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"
)

// quotaMillis is the CPU limit of the Kubernetes manifests, in thousandths of a
// processor.
const quotaMillis = 500

// quotaLoads are what is offered to the contestants with a quota, in percent of what
// they can do.
var quotaLoads = []int{50, 25}

func quotaName(percent int) string { return fmt.Sprint("quota", percent) }

// isQuota reports whether work is for contestants with a quota, and for no others.
func isQuota(work string) bool { return strings.HasPrefix(work, "quota") }

// makeQuota makes a control group that may use quotaMillis, of either version, and
// returns its folder.
func makeQuota() (string, error) {
	const period = 100_000 // µs, as Kubernetes has it
	const quota = period * quotaMillis / 1000
	parent, file, limit := "/sys/fs/cgroup/cpu", "cpu.cfs_quota_us", fmt.Sprint(quota)
	if isFile("/sys/fs/cgroup/cgroup.controllers") { // version 2
		parent, file, limit = "/sys/fs/cgroup", "cpu.max", fmt.Sprint(quota, period)
		// If it fails, the group has no such file.
		_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+cpu"), 0)
	}
	dir, err := os.MkdirTemp(parent, "bench-")
	if err == nil {
		if err = os.WriteFile(filepath.Join(dir, file), []byte(limit), 0); err == nil {
			return dir, nil
		}
		err = errors.Join(err, os.Remove(dir))
	}
	return "", fmt.Errorf("no control group with a CPU quota can be made here, which takes root and the cpu controller: %w "+
		"(or choose other work with -work)", err)
}

// tryQuota reports whether makeQuota works.
func tryQuota() error {
	dir, err := makeQuota()
	if err != nil {
		return err
	}
	return os.Remove(dir)
}

// inQuota is a command that runs args in the control group from its first
// instruction on: Go looks for a quota when it starts.
func inQuota(dir string, args []string) []string {
	return append([]string{"/bin/sh", "-c", `echo $$ >"$0"/cgroup.procs && exec "$@"`, dir}, args...)
}

// measureOffered returns the figures of quotaColumns. The first target that it
// measures sets the rate at which all get requests: so many percent of what it does
// when clients ask again as soon as they are answered. Requests that come one by one
// cost more than those of a queue that is never empty: the quota shows.
func measureOffered(percent int) runner {
	e := small(256)
	return func(ctx context.Context, t *target, d time.Duration) ([]float64, error) {
		if e.rate == 0 {
			l, err := repeat(ctx, t, small(32), d)
			if err != nil {
				return nil, err
			}
			e.rate = l.perSecond() * float64(percent) / 100
		}
		l, err := repeat(ctx, t, e, 2*d)
		if err != nil {
			return nil, err
		}
		return append(l.figures(), l.cpu/l.elapsed.Seconds()/quotaMillis*1000*100), nil
	}
}

// offer returns what each client does to send requests at random times, e.rate of
// them a second for d, whether or not others have been answered. A latency counts
// from when the request was due.
func offer(request []byte, e exchange, d time.Duration) func(*client) ([]time.Duration, error) {
	due := []time.Duration{0}
	random := rand.New(rand.NewPCG(1, 2)) // the same times for everyone
	for at := time.Duration(0); at < d; due = append(due, at) {
		at += time.Duration(random.ExpFloat64() / e.rate * float64(time.Second))
	}
	var next atomic.Int64
	begun := time.Now()
	return func(c *client) ([]time.Duration, error) {
		if err := c.expect(d + patience); err != nil {
			return nil, err
		}
		var took []time.Duration
		for i := next.Add(1); int(i) <= len(due); i = next.Add(1) {
			at := begun.Add(due[i-1])
			time.Sleep(time.Until(at))
			if err := c.do(request, e.answerSize); err != nil {
				return nil, err
			}
			took = append(took, time.Since(at))
		}
		return took, nil
	}
}
