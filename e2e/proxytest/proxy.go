// Package proxytest builds the real proxy binary, runs it, and observes it from
// outside: its log, /health, /metrics, its sockets and how it ends.
//
// Everything returns errors, so that a command can use it as well as a test; testing.go wraps the common steps for tests.
package proxytest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"
)

// The log messages that mark the life cycle, as the runbook has them.
const (
	MsgRunning          = "state: Running — accepting requests"
	MsgRequestCompleted = "request completed"
	MsgSIGTERM          = "received SIGTERM, shutting down"
	MsgDrained          = "all in-flight requests drained"
	MsgDrainTimeout     = "drain timeout exceeded, forcing shutdown"
	MsgShutdownComplete = "shutdown complete"
)

// Timeout is how long the helpers here wait for what should happen at once: long
// enough for the noisiest machine, as only failures wait so long.
const Timeout = 20 * time.Second

// Options say how to run the proxy. The zero value runs it without arguments, in an empty environment.
type Options struct {
	Args   []string // after the config flag, if there is one
	Env    []string // all of it, as KEY=VALUE: nothing is inherited
	Config string   // TOML; if not empty it is written to a file and named by -config
	Binary string   // the program to run; if empty, that of [Build]

	Stdout      io.Writer      // takes the log, which is then not kept here
	DeathSignal syscall.Signal // what it gets when this process dies; if 0, SIGKILL

	// What confines it. Of the limits, only one: each takes a control group of its own, and root.
	CPUs      float64  // how many processors it may use; if 0, all
	MemoryMiB int      // how much memory it may use; if 0, any
	Before    string   // lines of shell that run before it, in the same process, such as ulimit -n 40
	Redirect  string   // of its output, as the shell has it, such as >/dev/full
	Within    []string // a command that it is appended to, such as nsenter with its arguments
}

// A Proxy is a running, or ended, proxy process.
type Proxy struct {
	// PID is the process id.
	PID int
	// Started is the time just before the process was started.
	Started time.Time
	// ConfigFile is the file that Options.Config was written to.
	ConfigFile string
	// Group is the folder of its control group, if it has a limit.
	Group string

	dir    string
	stdout *logs
	stderr *logs
	done   chan struct{} // closed once the process has ended and its output is read
	state  *os.ProcessState

	mu   sync.Mutex
	addr string // once known
}

// Start runs the proxy and returns at once; see [Proxy.WaitRunning]. The process is killed when this one dies, so that nothing
// outlives an aborted test, but call [Proxy.Stop] in the ordinary case.
func Start(o Options) (*Proxy, error) {
	binary := o.Binary
	if binary == "" {
		var err error
		if binary, err = Build(); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp("", "proxytest-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the proxy: %w", err)
	}
	p := &Proxy{dir: dir, stdout: newLogs(), stderr: newLogs(), done: make(chan struct{})}
	args := o.Args
	if o.Config != "" {
		p.ConfigFile = filepath.Join(dir, "config.toml")
		args = append([]string{"-config", p.ConfigFile}, args...)
		err = os.WriteFile(p.ConfigFile, []byte(o.Config), 0o600)
	}
	if err == nil && (o.CPUs > 0 || o.MemoryMiB > 0) {
		p.Group, err = o.makeGroup()
	}
	if err == nil {
		err = p.spawn(o.confined(p.Group, binary, args), o)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting the proxy: %w", err), p.removeFolders())
	}
	return p, nil
}

// spawn starts the process and, behind it, waits for its end.
func (p *Proxy) spawn(command []string, o Options) error {
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Dir = p.dir
	cmd.Env = append([]string{}, o.Env...) // not nil, which would inherit
	cmd.Stdout, cmd.Stderr = p.stdout, p.stderr
	if o.Stdout != nil {
		cmd.Stdout = o.Stdout
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: cmp.Or(o.DeathSignal, syscall.SIGKILL)}

	started := make(chan error)
	go func() {
		// Pdeathsig fires when the thread that forked ends, so that thread is held until the child is gone (golang/go#27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		p.Started = time.Now()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.PID = cmd.Process.Pid
		started <- nil
		_ = cmd.Wait() // its verdict is in ProcessState
		p.state = cmd.ProcessState
		close(p.done)
	}()
	return <-started
}

// Signal sends sig to the process.
func (p *Proxy) Signal(sig syscall.Signal) error {
	select {
	case <-p.done:
		return fmt.Errorf("sending %v: the proxy has ended (%v)", sig, p.state)
	default:
		return syscall.Kill(p.PID, sig)
	}
}

// Done is closed when the process has ended.
func (p *Proxy) Done() <-chan struct{} { return p.done }

// Wait waits for the process to end and returns its exit code, -1 if a signal
// killed it. It fails if the process outlives the timeout.
func (p *Proxy) Wait(timeout time.Duration) (int, error) {
	select {
	case <-p.done:
		return p.state.ExitCode(), nil
	case <-time.After(timeout):
		return 0, fmt.Errorf("the proxy still runs after %v; the log is:\n%s", timeout, p.stdout)
	}
}

// Stop ends the process, at once if need be, and removes its files. Stopping twice does no harm.
func (p *Proxy) Stop() error {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGTERM, syscall.SIGKILL} {
		if p.Signal(sig) != nil {
			break // it has ended
		}
		if _, err := p.Wait(time.Second); err == nil {
			break
		}
	}
	if _, err := p.Wait(Timeout); err != nil {
		return err
	}
	return p.removeFolders()
}

func (p *Proxy) removeFolders() error {
	err := os.RemoveAll(p.dir)
	if p.Group != "" {
		err = errors.Join(err, os.Remove(p.Group))
		p.Group = ""
	}
	return err
}

// WaitLog returns the first line with this message, waiting for it if need be.
func (p *Proxy) WaitLog(message string, timeout time.Duration) (Line, error) {
	return p.WaitLine(fmt.Sprintf("message %q", message), timeout, func(l Line) bool {
		return l.Message() == message
	})
}

// WaitLine returns the first line that matches, waiting for it if need be. It fails when the process ends without such a line.
// What describes the line in errors.
func (p *Proxy) WaitLine(what string, timeout time.Duration, match func(Line) bool) (Line, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), timeout,
		fmt.Errorf("no log line with %s after %v", what, timeout))
	defer cancel()
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	go func() {
		select {
		case <-p.done:
			end(fmt.Errorf("the proxy ended (%v) before a log line with %s; stderr: %s", p.state, what, p.stderr))
		case <-ctx.Done():
		}
	}()
	return p.stdout.wait(ctx, match)
}

// Logs returns the log so far.
func (p *Proxy) Logs() []Line {
	lines, _ := p.stdout.since(0)
	return lines
}

// Stdout returns the log so far, as it was written.
func (p *Proxy) Stdout() string { return p.stdout.String() }

// Stderr returns standard error so far. The contract is that it stays empty while the proxy serves.
func (p *Proxy) Stderr() string { return p.stderr.String() }
