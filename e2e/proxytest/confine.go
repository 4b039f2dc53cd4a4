package proxytest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// confined returns the command that runs a program as o has it confined: it becomes the program, in the same process.
func (o Options) confined(group, binary string, args []string) []string {
	script := "exec \"$@\" " + o.Redirect
	if o.Before != "" {
		script = o.Before + "\n" + script
	}
	if group != "" { // from its first instruction on: Go looks for limits when it starts
		script = fmt.Sprintf("echo $$ >'%s/cgroup.procs'\n%s", group, script)
	}
	command := append([]string{binary}, args...)
	if script != "exec \"$@\" " {
		command = append([]string{"/bin/sh", "-ec", script, "sh"}, command...)
	}
	return append(o.Within[:len(o.Within):len(o.Within)], command...)
}

const controlGroups = "/sys/fs/cgroup"

// makeGroup makes a control group, of either version, with the limit that o has, and returns its folder.
func (o Options) makeGroup() (dir string, err error) {
	const period = 100_000 // µs, as Kubernetes has it
	quota := int(period * o.CPUs)
	controller, file, limit := "cpu", [...]string{"cpu.cfs_quota_us", "cpu.max"}, [...]string{fmt.Sprint(quota), fmt.Sprint(quota, " ", period)}
	if o.MemoryMiB > 0 {
		bytes := fmt.Sprint(o.MemoryMiB << 20)
		controller, file, limit = "memory", [...]string{"memory.limit_in_bytes", "memory.max"}, [...]string{bytes, bytes}
	}
	version, parent := 0, filepath.Join(controlGroups, controller)
	if _, err := os.Stat(filepath.Join(controlGroups, "cgroup.controllers")); err == nil {
		version, parent = 1, controlGroups
		// If it fails, the group has no such file.
		_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
	if dir, err = os.MkdirTemp(parent, "proxytest-"); err == nil {
		if err = os.WriteFile(filepath.Join(dir, file[version]), []byte(limit[version]), 0); err == nil {
			return dir, nil
		}
		err = errors.Join(err, os.Remove(dir))
	}
	return "", fmt.Errorf("no control group with a limit can be made here, which takes root and the controller %q: %w", controller, err)
}

// PeakMiB is the most memory that the proxy's control group has used, with what the kernel held for it. For tests with
// Options.MemoryMiB.
func (p *Proxy) PeakMiB() (int64, error) {
	var text []byte
	var err error
	for _, name := range []string{"memory.max_usage_in_bytes", "memory.peak"} {
		if text, err = os.ReadFile(filepath.Join(p.group, name)); err == nil {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n >> 20, err
}
