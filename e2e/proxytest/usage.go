package proxytest

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// family returns the process and its children.
func (p *Proxy) family() (procfs.Procs, error) {
	all, err := procfs.AllProcs()
	if err != nil {
		return nil, err
	}
	var found procfs.Procs
	for _, process := range all {
		// Who can't be read has ended meanwhile.
		if s, err := process.Stat(); err == nil && (s.PID == p.PID || s.PPID == p.PID) {
			found = append(found, process)
		}
	}
	if found == nil {
		return nil, fmt.Errorf("process %d has ended", p.PID)
	}
	return found, nil
}

// CPU returns the processor time of the process and its children. Their clocks are exact; /proc has hundredths of a second.
func (p *Proxy) CPU() (sum time.Duration, err error) {
	family, err := p.family()
	if err != nil {
		return 0, err
	}
	for _, process := range family {
		var used unix.Timespec
		clock := int32(^process.PID)<<3 | 2 // clock_getcpuclockid(3)
		if err := unix.ClockGettime(clock, &used); err != nil && process.PID == p.PID {
			return 0, fmt.Errorf("reading processor time: %w", err)
		}
		sum += time.Duration(used.Nano())
	}
	return sum, nil
}

// Memory returns what the process and its children hold, in bytes; pss has pages that several share divided among them.
func (p *Proxy) Memory() (rss, pss uint64, err error) {
	family, err := p.family()
	if err != nil {
		return 0, 0, err
	}
	for _, process := range family {
		held, err := process.ProcSMapsRollup()
		ended := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
		if err != nil && (process.PID == p.PID || !ended) {
			return 0, 0, fmt.Errorf("reading memory: %w", err)
		}
		rss += held.Rss
		pss += held.Pss
	}
	return rss, pss, nil
}

// FreeAddr returns an address of loopback with a port that nobody uses, for programs that can't choose one and tell.
func FreeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("looking for a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}
