package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// family returns root and all processes below it that run now.
func family(root int) ([]procfs.ProcStat, error) {
	all, err := procfs.AllProcs()
	if err != nil {
		return nil, err
	}
	var found []procfs.ProcStat
	children := map[int][]procfs.ProcStat{}
	for _, p := range all {
		switch s, err := p.Stat(); {
		case err != nil: // it has ended meanwhile
		case s.PID == root:
			found = append(found, s)
		default:
			children[s.PPID] = append(children[s.PPID], s)
		}
	}
	if found == nil {
		return nil, fmt.Errorf("process %d has ended", root)
	}
	for i := 0; i < len(found); i++ {
		found = append(found, children[found[i].PID]...)
	}
	return found, nil
}

// readCPU returns the processor time, in seconds, of root and all processes below it.
// Their clocks are exact; /proc has hundredths of a second.
func readCPU(root int) (float64, error) {
	processes, err := family(root)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, s := range processes {
		var used unix.Timespec
		clock := int32(^s.PID)<<3 | 2 // clock_getcpuclockid(3)
		if err := unix.ClockGettime(clock, &used); err != nil && s.PID == root {
			return 0, fmt.Errorf("reading processor time: %w", err)
		}
		sum += time.Duration(used.Nano())
	}
	return sum.Seconds(), nil
}

// memory is what processes hold, in bytes.
type memory struct {
	rss float64 // resident
	pss float64 // resident, with pages shared by several divided among them
}

// readMemory returns the memory of root and all processes below it.
func readMemory(root int) (memory, error) {
	processes, err := family(root)
	if err != nil {
		return memory{}, err
	}
	var sum memory
	for _, s := range processes {
		var held procfs.ProcSMapsRollup
		p, err := procfs.NewProc(s.PID)
		if err == nil {
			held, err = p.ProcSMapsRollup()
		}
		ended := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
		if err != nil && (s.PID == root || !ended) {
			return memory{}, fmt.Errorf("reading memory: %w", err)
		}
		sum.rss += float64(held.Rss)
		sum.pss += float64(held.Pss)
	}
	return sum, nil
}

// machine is what all processors have done so far, in seconds.
type machine struct {
	busy, all float64 // busy with what the host stole, too
	own       float64 // of this process and the children it has waited for
}

// readMachine reads it. Interrupts count as busy: kernels that do not charge them
// to processes make ours look like others'.
func readMachine() (machine, error) {
	proc, err := procfs.NewDefaultFS()
	if err != nil {
		return machine{}, err
	}
	stat, err := proc.Stat()
	if err != nil {
		return machine{}, err
	}
	c := stat.CPUTotal
	m := machine{busy: c.User + c.Nice + c.System + c.IRQ + c.SoftIRQ + c.Steal}
	m.all = m.busy + c.Idle + c.Iowait
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var used syscall.Rusage
		if err := syscall.Getrusage(who, &used); err != nil {
			return machine{}, err
		}
		m.own += time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
	}
	return m, nil
}

// others returns which part of the machine others have used between two readings.
func others(from, to machine) float64 {
	return max(0, (to.busy-from.busy)-(to.own-from.own)) / (to.all - from.all)
}

// noise is what others used of the machine in the second before a round, and in it.
type noise struct {
	Before float64 `json:"before"`
	During float64 `json:"during"`
}

// quiet is what others may use of a machine that is good for measuring.
const quiet = 0.1

// awaitQuiet waits for a second in which others leave the machine alone, for at
// most *budget, of which it takes what it needs. It returns the last reading, and
// what others used in the second before.
func awaitQuiet(ctx context.Context, budget *time.Duration) (machine, float64, error) {
	for {
		from, err := readMachine()
		if err == nil {
			err = pause(ctx, time.Second)
		}
		to, errTo := readMachine()
		if err := errors.Join(err, errTo); err != nil {
			return machine{}, 0, err
		}
		used := others(from, to)
		if *budget -= time.Second; used <= quiet || *budget <= 0 {
			return to, used, nil
		}
	}
}
