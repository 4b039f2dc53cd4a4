package main

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
)

// machine is what all processors have done so far, in seconds.
type machine struct {
	busy, all float64 // busy with what the host stole, too
	own       float64 // of this process and the children it has waited for
}

// readMachine reads it. Interrupts count as busy: kernels that do not charge them to processes make ours look like others'.
func readMachine() (m machine, err error) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return m, err
	}
	stat, err := proc.Stat()
	c := stat.CPUTotal
	m.busy = c.User + c.Nice + c.System + c.IRQ + c.SoftIRQ + c.Steal
	m.all = m.busy + c.Idle + c.Iowait
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var used syscall.Rusage
		err = errors.Join(err, syscall.Getrusage(who, &used))
		m.own += time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	}
	return m, err
}

// others returns which part of the machine others have used between two readings.
func others(from, to machine) float64 {
	return max(0, (to.busy-from.busy)-(to.own-from.own)) / (to.all - from.all)
}

// othersDuring returns which part of the machine others have used while f ran.
func othersDuring(f func() error) (float64, error) {
	from, errFrom := readMachine()
	err := f()
	to, errTo := readMachine()
	return others(from, to), errors.Join(errFrom, err, errTo)
}

// quiet is what others may use of a machine that is good for measuring.
const quiet = 0.1

// awaitQuiet waits for a second in which others leave the machine alone, for at most *budget, of which it takes what it needs.
func awaitQuiet(ctx context.Context, budget *time.Duration) error {
	for {
		used, err := othersDuring(func() error { return pause(ctx, time.Second) })
		if *budget -= time.Second; err != nil || used <= quiet || *budget <= 0 {
			return err
		}
	}
}

// pause waits for d, unless ctx ends.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
