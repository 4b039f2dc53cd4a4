//go:build faults

package faults

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// wrapped returns a program that runs these lines of shell and then becomes the
// proxy, with redirect appended to its command line.
func (s *scene) wrapped(lines, redirect string) (path string) {
	s.Helper()
	build := proxytest.BuildRaced
	if s.fault.release {
		build = proxytest.Build
	}
	binary, err := build()
	if err != nil {
		s.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh -e\n%s\nexec '%s' \"$@\" %s\n", lines, binary, redirect)
	// A process that another scene forks meanwhile would have the file open for
	// writing, and what is open for writing can't be run (golang/go#22315).
	syscall.ForkLock.RLock()
	path = s.File("wrapped", script)
	syscall.ForkLock.RUnlock()
	if err := os.Chmod(path, 0o700); err != nil {
		s.Fatal(err)
	}
	return path
}

// A cgroup is a control group of the kernel's, for one process.
type cgroup struct {
	s   *scene
	dir string
	v1  bool
}

// cgroup makes a group under this controller, "memory" or "cpu".
func (s *scene) cgroup(controller string) *cgroup {
	s.Helper()
	const root = "/sys/fs/cgroup"
	g := &cgroup{s: s, dir: filepath.Join(root, controller)}
	if _, err := os.Stat(g.dir); err == nil {
		g.v1 = true
	} else {
		g.dir = root
		if err := os.WriteFile(filepath.Join(root, "cgroup.subtree_control"), []byte("+"+controller), 0); err != nil {
			s.Fatalf("this fault needs root and the %s control group: %v", controller, err)
		}
	}
	g.dir = filepath.Join(g.dir, fmt.Sprintf("faults-%d-%d", os.Getpid(), time.Now().UnixNano()))
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		s.Fatalf("this fault needs root and the %s control group: %v", controller, err)
	}
	s.Cleanup(func() { // after the process, whose cleanup is registered later
		if err := os.Remove(g.dir); err != nil {
			s.Error(err)
		}
	})
	return g
}

// enter is a line of shell.
func (g *cgroup) enter() string { return fmt.Sprintf("echo $$ > '%s/cgroup.procs'", g.dir) }

// set writes one of the group's files: v1 or v2, name and value.
func (g *cgroup) set(v1, v2 [2]string) {
	g.s.Helper()
	file := v2
	if g.v1 {
		file = v1
	}
	if err := os.WriteFile(filepath.Join(g.dir, file[0]), []byte(file[1]), 0o644); err != nil {
		g.s.Fatal(err)
	}
}

// peak returns the most memory that the group has used, in MiB.
func (g *cgroup) peak() int64 {
	g.s.Helper()
	name := "memory.peak"
	if g.v1 {
		name = "memory.max_usage_in_bytes"
	}
	text, err := os.ReadFile(filepath.Join(g.dir, name))
	if err != nil {
		g.s.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil {
		g.s.Fatal(err)
	}
	return n >> 20
}
