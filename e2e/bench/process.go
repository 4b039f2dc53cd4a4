package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A testbed is what the contestants of a run share.
type testbed struct {
	upstream *upstream
	dir      string   // with a folder for each contestant
	env      []string // of the proxy, in addition
	fullRate float64  // requests/s that the first contestant with a quota reached; 0: not measured yet
}

func newTestbed(o options) (*testbed, error) {
	// Set in any case: only then does Go hand it down to children.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: maxFiles, Max: maxFiles}); err != nil {
		return nil, fmt.Errorf("raising the limit of open files: %w (run 'ulimit -Hn %d' as root first)", err, maxFiles)
	}
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return nil, fmt.Errorf("making a folder for the run: %w", err)
	}
	b := &testbed{dir: dir, env: o.env}
	// nginx' workers, which are not root, have to get at their folders in it.
	if err = os.Chmod(dir, 0o755); err == nil {
		b.upstream, err = startUpstream(dir, !o.http1)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return b, nil
}

func (b *testbed) close() error {
	b.upstream.CloseClientConnections()
	b.upstream.Close()
	return os.RemoveAll(b.dir)
}

// A target is a contestant that is ready for requests.
type target struct {
	*testbed
	name    string
	addr    string
	process *proxytest.Proxy // nil for direct
	idle    figures          // of processWork
}

// start runs c and waits until it listens and its memory is that of an idle process.
func (b *testbed) start(c contestant) (_ *target, err error) {
	t := &target{testbed: b, name: c.name, addr: b.upstream.addr}
	if c.name == direct {
		return t, nil
	}
	dir := filepath.Join(b.dir, c.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making a folder for the contestant: %w", err)
	}
	if t.addr, err = proxytest.FreeAddr(); err != nil {
		return nil, err
	}
	o := proxytest.Options{
		Binary:      c.binary,
		Env:         append([]string{"HOME=" + dir, "SSL_CERT_FILE=" + b.upstream.caFile}, c.env...),
		Stdout:      io.Discard,      // by way of a pipe, as Kubernetes reads a container's log
		DeathSignal: syscall.SIGTERM, // nginx' workers outlive a master that is killed
	}
	if o.Args, err = c.configure(dir, t.addr, b.upstream); err != nil {
		return nil, err
	}
	if c.config == proxyConfig {
		o.Env = append(o.Env, b.env...)
	}
	if c.quota {
		o.CPUs = quotaCPUs
	}
	if t.process, err = proxytest.Start(o); err != nil {
		return nil, err
	}
	if err := t.settle(c.binary); err != nil {
		return nil, t.stop(err)
	}
	return t, nil
}

// settle waits until t listens and its memory no longer changes: who listens has not always started its workers yet.
func (t *target) settle(binary string) error {
	if err := t.awaitListening(); err != nil {
		return err
	}
	started := time.Since(t.process.Started)
	info, err := os.Stat(binary)
	if err != nil {
		return err
	}
	const step, grain = 20 * time.Millisecond, 64 << 10
	for before := 0.0; ; time.Sleep(step) {
		rss, pss, err := t.memory()
		if err != nil {
			return err
		}
		if math.Abs(rss-before) < grain {
			t.idle = figures{startTime: milliseconds(started), binarySize: float64(info.Size()) / 1e6, idleRSS: rss / 1e6, idlePSS: pss / 1e6}
			return nil
		}
		if before = rss; time.Since(t.process.Started) > proxytest.Timeout {
			return fmt.Errorf("its memory still changes after %v", proxytest.Timeout)
		}
	}
}

// awaitListening connects until that succeeds. WaitListening would read the kernel's list of sockets, which a run makes long and slow.
func (t *target) awaitListening() error {
	for time.Since(t.process.Started) < proxytest.Timeout {
		if conn, err := net.Dial("tcp", t.addr); err == nil {
			return conn.Close()
		}
		select {
		case <-t.process.Done():
			return errors.New("it ended before it listened")
		case <-time.After(200 * time.Microsecond):
		}
	}
	return fmt.Errorf("it does not listen on %s after %v", t.addr, proxytest.Timeout)
}

// run measures w for d.
func (t *target) run(ctx context.Context, w workload, d time.Duration) (figures, error) {
	limit := time.Minute + 5*d
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("%s hangs: not done after %v", w.name, limit))
	defer cancel()
	measured, err := w.run(ctx, t, d)
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return measured, err
}

// cpu returns the processor time in seconds that t has used so far.
func (t *target) cpu() (float64, error) {
	if t.process == nil {
		return math.NaN(), nil
	}
	used, err := t.process.CPU()
	return used.Seconds(), err
}

// memory returns what t holds now, in bytes.
func (t *target) memory() (rss, pss float64, err error) {
	if t.process == nil {
		return math.NaN(), math.NaN(), nil
	}
	resident, proportional, err := t.process.Memory()
	return float64(resident), float64(proportional), err
}

// stop ends the process. To err, if there is one, it adds what the process wrote to its standard error.
func (t *target) stop(err error) error {
	if t.process == nil {
		return err
	}
	if said := t.process.Stderr(); err != nil && said != "" {
		err = fmt.Errorf("%w; it says:\n%s", err, said)
	}
	return errors.Join(err, t.process.Stop())
}
