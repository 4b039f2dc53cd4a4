package tailnet

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// process is a running daemon and what it has written.
type process struct {
	cmd    *exec.Cmd
	output output
	done   chan struct{} // closed once it has ended
}

// spawn starts a daemon that gets the signal death if this process dies, so
// that an aborted test leaves nothing behind.
func spawn(path string, args, env []string, death syscall.Signal) (*process, error) {
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{})}
	p.cmd.Env = env
	p.cmd.Stdout, p.cmd.Stderr = &p.output, &p.output
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: death}
	p.cmd.WaitDelay = time.Second // a grandchild may still hold the pipe

	started := make(chan error)
	go func() {
		// The death signal fires when the thread that forked ends, so that
		// thread is held until the child is gone (golang/go#27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // its verdict is in ProcessState
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", path, err)
	}
	return p, nil
}

// signal sends sig, SIGKILL to its descendants too. A process that has ended is
// not an error.
func (p *process) signal(sig syscall.Signal) error {
	switch {
	case !p.running():
		return nil
	case sig == syscall.SIGKILL:
		return killTree(p.cmd.Process.Pid)
	default:
		return p.cmd.Process.Signal(sig)
	}
}

// wait waits for the end of the process.
func (p *process) wait(ctx context.Context) error {
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s to end: %w", p.cmd.Path, context.Cause(ctx))
	}
}

// running reports whether the process has not ended.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// output collects what a process writes.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// find returns the first group of the first match so far, or "".
func (o *output) find(re *regexp.Regexp) string {
	if m := re.FindStringSubmatch(o.String()); m != nil {
		return m[1]
	}
	return ""
}

// poll calls ok until it returns true or ctx ends.
func poll(ctx context.Context, ok func() bool) error {
	for !ok() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
