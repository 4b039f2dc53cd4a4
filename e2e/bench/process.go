package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// A testbed is what the contestants of a run share.
type testbed struct {
	dir          string // with a folder for each contestant
	http1, http2 *fakeanthropic.Server
	fullRate     float64 // requests/s that the first contestant with a quota reached; 0: not measured yet
}

func newTestbed() (*testbed, error) {
	// Set in any case: only then does Go hand it down to children.
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: maxFiles, Max: maxFiles}); err != nil {
		return nil, fmt.Errorf("raising the limit of open files: %w (run 'ulimit -Hn %d' as root first)", err, maxFiles)
	}
	dir, errDir := os.MkdirTemp("", "bench-")
	http1, err1 := startUpstream(fakeanthropic.HTTP1)
	http2, err2 := startUpstream(fakeanthropic.HTTP2)
	// nginx' workers, which are not root, have to get at their folders.
	return &testbed{dir: dir, http1: http1, http2: http2}, errors.Join(errDir, err1, err2, os.Chmod(dir, 0o755))
}

func (b *testbed) close() error {
	return errors.Join(b.http1.Close(), b.http2.Close(), os.RemoveAll(b.dir))
}

// A target is a contestant that is ready for requests.
type target struct {
	*testbed
	contestant
	addr     string
	upstream *fakeanthropic.Server
	process  *proxytest.Proxy // nil for direct
	idle     figures          // of processWork
}

// start runs c and waits until it listens and its memory is that of an idle process.
func (b *testbed) start(c contestant, env ...string) (*target, error) {
	t := &target{testbed: b, contestant: c, upstream: b.http2}
	if c.http1 {
		t.upstream = b.http1
	}
	if c.name == direct {
		t.addr = address(t.upstream)
		return t, nil
	}
	var err error
	dir := filepath.Join(b.dir, c.name)
	t.addr, err = proxytest.FreeAddr()
	if err := errors.Join(err, os.MkdirAll(dir, 0o755)); err != nil {
		return nil, err
	}
	o := proxytest.Options{
		Binary:      c.binary,
		Env:         append(append(t.upstream.Env(), "HOME="+dir), append(env, c.env...)...),
		Stdout:      io.Discard,      // by way of a pipe, as Kubernetes reads a container's log
		DeathSignal: syscall.SIGTERM, // nginx' workers outlive a master that is killed
	}
	if c.quota {
		o.CPUs = quotaCPUs
	}
	if o.Args, err = c.configure(dir, t.addr, t.upstream); err != nil {
		return nil, err
	}
	if t.process, err = proxytest.Start(o); err != nil {
		return nil, err
	}
	if err := t.settle(); err != nil {
		return nil, t.stop(err)
	}
	return t, nil
}

// settle waits until t listens and its memory no longer changes: who listens has not always started its workers yet.
func (t *target) settle() error {
	// WaitListening would read the kernel's list of sockets, which a run makes long and slow.
	conn, err := net.Dial("tcp", t.addr)
	for ; err != nil; conn, err = net.Dial("tcp", t.addr) {
		if time.Since(t.process.Started) > proxytest.Timeout {
			return fmt.Errorf("it does not listen: %w", err)
		}
		time.Sleep(200 * time.Microsecond)
	}
	started := time.Since(t.process.Started)
	info, err := os.Stat(t.binary)
	if err := errors.Join(err, conn.Close()); err != nil {
		return err
	}
	t.idle = figures{startTime: milliseconds(started), binarySize: float64(info.Size()) / 1e6}
	const step, grain = 20 * time.Millisecond, 0.064 // MB
	return proxytest.Poll(func() string {
		time.Sleep(step)
		_, rss, pss, err := t.usage()
		if err != nil {
			return err.Error()
		}
		change := rss - t.idle[idleRSS]
		t.idle[idleRSS], t.idle[idlePSS] = rss, pss
		if math.Abs(change) >= grain {
			return "its memory still changes"
		}
		return ""
	})
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
