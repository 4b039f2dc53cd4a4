package main

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// patience is how long anything that should happen at once may take.
const patience = 20 * time.Second

// A target is a contestant that is ready for requests.
type target struct {
	name  string
	addr  string
	tls   *tls.Config // for direct, nil for all others
	start time.Duration
	size  int64 // of the binary, bytes
	idle  memory

	dir   string // the process', removed by stop
	group string // its control group's folder, likewise; empty if it needs none
	cmd   *exec.Cmd
	ended chan struct{} // closed when cmd has ended
}

// start runs c and waits until it listens.
func start(c contestant, up *upstream, env []string) (*target, error) {
	if c.name == direct {
		return &target{name: c.name, addr: up.addr, tls: &tls.Config{RootCAs: up.roots, ServerName: serverName}}, nil
	}
	t := &target{name: c.name}
	if err := t.launch(c, up, env); err != nil {
		return nil, errors.Join(t.explain(err), t.stop())
	}
	return t, nil
}

// launch configures c and starts its process.
func (t *target) launch(c contestant, up *upstream, env []string) (err error) {
	if t.dir, err = os.MkdirTemp("", "bench-"); err != nil {
		return fmt.Errorf("making a folder for the contestant: %w", err)
	}
	// nginx' workers, which are not root, have to get at their folders in it.
	if err := os.Chmod(t.dir, 0o755); err != nil {
		return err
	}
	if t.addr, err = freeAddress(); err != nil {
		return err
	}
	s := setup{
		Dir: t.dir, Listen: t.addr, Upstream: up.addr, ServerName: serverName, CAFile: up.caFile,
		Beta: beta, Workers: workers, Connections: maxConnections, Files: maxFiles,
	}
	if err := configure(c, &s); err != nil {
		return err
	}
	if info, err := os.Stat(c.binary); err == nil {
		t.size = info.Size()
	}
	command := append([]string{c.binary}, c.args(s)...)
	if c.quota {
		if t.group, err = makeQuota(); err != nil {
			return err
		}
		command = inQuota(t.group, command)
	}
	t.cmd = exec.Command(command[0], command[1:]...)
	t.cmd.Dir = t.dir
	t.cmd.Env = append([]string{"HOME=" + t.dir, "SSL_CERT_FILE=" + up.caFile}, c.env...)
	if c.config == proxyConfig {
		t.cmd.Env = append(t.cmd.Env, env...)
	}
	if t.cmd.Stderr, err = os.Create(t.stderrFile()); err != nil {
		return err
	}
	begun := time.Now()
	if err := t.spawn(); err != nil {
		return err
	}
	if err := t.awaitListening(begun); err != nil {
		return err
	}
	return t.settle()
}

// settle reads the idle memory, once it no longer changes: who listens has not
// always started its workers yet.
func (t *target) settle() error {
	const step, grain = 20 * time.Millisecond, 64 << 10
	for deadline := time.Now().Add(patience); ; time.Sleep(step) {
		now, err := t.memory()
		if err != nil || math.Abs(now.rss-t.idle.rss) < grain {
			t.idle = now
			return err
		}
		t.idle = now
		if time.Now().After(deadline) {
			return fmt.Errorf("its memory still changes after %v", patience)
		}
	}
}

func (t *target) stderrFile() string { return filepath.Join(t.dir, "stderr") }

// spawn starts t.cmd, its standard output going to a pipe that is read as Kubernetes
// reads a container's log, and waits for its end behind it. The process gets SIGTERM should this one die.
func (t *target) spawn() error {
	t.cmd.Stdout = io.Discard
	t.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	started := make(chan error)
	ended := make(chan struct{})
	go func() {
		// Pdeathsig fires when the thread that forked ends (golang/go#27505).
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := t.cmd.Start()
		t.cmd.Stderr.(*os.File).Close() // the child has it
		started <- err
		if err == nil {
			_ = t.cmd.Wait() // however it ends: asked to, or explained by its stderr
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	t.ended = ended
	return nil
}

// awaitListening tries to connect until that succeeds.
func (t *target) awaitListening(begun time.Time) error {
	for {
		conn, err := net.Dial("tcp", t.addr)
		if err == nil {
			t.start = time.Since(begun)
			return conn.Close()
		}
		select {
		case <-t.ended:
			return fmt.Errorf("it ended (%v) before it listened", t.cmd.ProcessState)
		case <-time.After(200 * time.Microsecond):
		}
		if time.Since(begun) > patience {
			return fmt.Errorf("it does not listen on %s after %v", t.addr, patience)
		}
	}
}

// cpu returns the processor time that t has used so far; NaN for direct.
func (t *target) cpu() (seconds float64, err error) {
	if t.cmd == nil {
		return math.NaN(), nil
	}
	return readCPU(t.cmd.Process.Pid)
}

// memory returns what t holds now; not for direct.
func (t *target) memory() (memory, error) {
	if t.cmd == nil {
		return memory{rss: math.NaN(), pss: math.NaN()}, nil
	}
	return readMemory(t.cmd.Process.Pid)
}

// explain adds to err what the process wrote to its standard error.
func (t *target) explain(err error) error {
	if t.dir == "" {
		return err
	}
	said, _ := os.ReadFile(t.stderrFile()) // err is what matters
	if len(said) == 0 {
		return err
	}
	const tail = 2000
	return fmt.Errorf("%w; it says:\n%s", err, said[max(0, len(said)-tail):])
}

// stop ends the process and removes its folder. A process that takes its time is
// killed, and its workers with it.
func (t *target) stop() error {
	if t.ended != nil {
		processes, _ := family(t.cmd.Process.Pid) // none if it has ended
		_ = t.cmd.Process.Signal(syscall.SIGTERM) // fails if it has ended
		select {
		case <-t.ended:
		case <-time.After(3 * time.Second):
			for _, p := range processes {
				_ = syscall.Kill(p.PID, syscall.SIGKILL)
			}
			<-t.ended
		}
	}
	var err error
	if t.group != "" {
		err = os.Remove(t.group)
	}
	if t.dir == "" {
		return err
	}
	return errors.Join(err, os.RemoveAll(t.dir))
}

// freeAddress returns an address of loopback with a port that nobody uses, as
// not every contestant can choose one and tell.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("looking for a free port: %w", err)
	}
	return l.Addr().String(), l.Close()
}
