package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// procDir is where the kernel tells about processes.
const procDir = "/proc"

// clockTick is the unit of times in /proc/PID/stat: 1/sysconf(_SC_CLK_TCK), which
// is 100 on every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// stat is what is of interest in /proc/PID/stat.
type stat struct {
	parent int
	cpu    time.Duration // user and system, with that of children it has waited for
}

// parseStat reads the content of /proc/PID/stat, proc(5).
func parseStat(content []byte) (stat, error) {
	// The second field, the name, is in parentheses and may have any character.
	_, rest, ok := cutLast(content, ") ")
	fields := strings.Fields(rest)
	const first, ppid, utime, cstime = 3, 4, 14, 17 // numbered from 1, as in the manual
	if !ok || len(fields) <= cstime-first {
		return stat{}, fmt.Errorf("unexpected process status %q", content)
	}
	var s stat
	var err error
	if s.parent, err = strconv.Atoi(fields[ppid-first]); err != nil {
		return stat{}, err
	}
	for i := utime; i <= cstime; i++ {
		ticks, err := strconv.ParseInt(fields[i-first], 10, 64)
		if err != nil {
			return stat{}, err
		}
		s.cpu += time.Duration(ticks) * clockTick
	}
	return s, nil
}

// cutLast splits s around the last sep.
func cutLast(s []byte, sep string) (before, after string, found bool) {
	i := bytes.LastIndex(s, []byte(sep))
	if i < 0 {
		return string(s), "", false
	}
	return string(s[:i]), string(s[i+len(sep):]), true
}

func readStat(pid int) (stat, error) {
	content, err := os.ReadFile(filepath.Join(procDir, strconv.Itoa(pid), "stat"))
	if err != nil {
		return stat{}, err
	}
	return parseStat(content)
}

// processTree returns root and all processes below it that run now.
func processTree(root int) []int {
	entries, err := os.ReadDir(procDir)
	if err != nil {
		return []int{root}
	}
	children := map[int][]int{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if s, err := readStat(pid); err == nil { // or it has ended meanwhile
			children[s.parent] = append(children[s.parent], pid)
		}
	}
	tree := []int{root}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree
}

// readCPU returns the processor time of root and all processes below it.
func readCPU(root int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range processTree(root) {
		s, err := readStat(pid)
		switch {
		case err == nil:
			sum += s.cpu
		case pid == root || !hasEnded(err):
			return 0, fmt.Errorf("reading processor time: %w", err)
		}
	}
	return sum, nil
}

// hasEnded reports whether err is what reading about a process gives that is
// there no more.
func hasEnded(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

// memory is what processes hold, in bytes.
type memory struct {
	rss float64 // resident
	pss float64 // resident, with pages shared by several divided among them
}

// readMemory returns the memory of root and all processes below it.
func readMemory(root int) (memory, error) {
	var sum memory
	for _, pid := range processTree(root) {
		m, err := readRollup(pid)
		switch {
		case err == nil:
			sum.rss += m.rss
			sum.pss += m.pss
		case pid == root || !hasEnded(err):
			return memory{}, fmt.Errorf("reading memory: %w", err)
		}
	}
	return sum, nil
}

func readRollup(pid int) (memory, error) {
	content, err := os.ReadFile(filepath.Join(procDir, strconv.Itoa(pid), "smaps_rollup"))
	if err != nil {
		return memory{}, err
	}
	return parseRollup(content)
}

// parseRollup reads the content of /proc/PID/smaps_rollup.
func parseRollup(content []byte) (memory, error) {
	var m memory
	wanted := map[string]*float64{"Rss:": &m.rss, "Pss:": &m.pss}
	var seen []string
	for lines := bufio.NewScanner(bytes.NewReader(content)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) != 3 || wanted[fields[0]] == nil {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return memory{}, err
		}
		*wanted[fields[0]] = float64(kib) * 1024
		seen = append(seen, fields[0])
	}
	slices.Sort(seen)
	if !slices.Equal(seen, []string{"Pss:", "Rss:"}) {
		return memory{}, fmt.Errorf("unexpected memory map %q", content)
	}
	return m, nil
}
