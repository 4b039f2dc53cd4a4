package main

import (
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
)

// problems collects what went wrong in a lane.
type problems struct {
	lane string

	mu    sync.Mutex
	first []string
	count int
}

// problemsKept is how many problems are told in full: of a thousand, the first tell
// what is wrong.
const problemsKept = 20

func (p *problems) add(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.count++; len(p.first) < problemsKept {
		p.first = append(p.first, p.lane+": "+fmt.Sprintf(format, args...))
	}
}

// all returns the first problems, and how many there are.
func (p *problems) all() (first []string, count int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.first), p.count
}

// report tells what happened, and returns an error if anything was wrong.
func report(out io.Writer, o options, lanes []*lane, stalls *pulse) error {
	fmt.Fprintf(out, "%v\n%d processors, %s; two proxies, with an upstream of HTTP/2 and one of HTTP/1.1\n"+
		"the machine stood still %v\n\n", o, runtime.NumCPU(), runtime.Version(), stalls)
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name any, value func(l *lane) any, more ...string) {
		fmt.Fprint(table, name)
		for _, l := range lanes {
			fmt.Fprintf(table, "\t%v", value(l))
		}
		fmt.Fprintln(table, strings.Join(append([]string{""}, more...), "\t"))
	}
	heading := func(name string, more ...string) { row(name, func(l *lane) any { return l.name }, more...) }
	reportTraffic(lanes, row, heading)
	heading("\nfigure")
	reportFigures(row)
	if err := table.Flush(); err != nil {
		return err
	}
	wrong := 0
	for _, l := range lanes {
		first, n := l.problems.all()
		for _, problem := range first {
			fmt.Fprintf(out, "\nWRONG: %s", problem)
		}
		if more := n - len(first); more > 0 {
			fmt.Fprintf(out, "\nWRONG: %s: %d more", l.name, more)
		}
		wrong += n
	}
	if wrong > 0 {
		fmt.Fprintln(out)
		return fmt.Errorf("%d things are wrong; the same requests again: %v", wrong, o)
	}
	_, err := fmt.Fprintln(out, "\nNot one byte was wrong, all counts add up, and nothing grows of what was seen for long enough.")
	return err
}

// A rowFunc writes a row of the report, with a value for each lane and, behind these, more.
type rowFunc func(name any, value func(l *lane) any, more ...string)

// reportTraffic counts the requests by kind, and by what went wrong and how they ended.
func reportTraffic(lanes []*lane, row rowFunc, heading func(name string, more ...string)) {
	counts := map[*lane]map[any]int{} // by kind and by fault
	ends := map[fault]map[string]int{}
	for _, l := range lanes {
		counts[l] = map[any]int{}
		ended := map[int]logLine{}
		for _, line := range l.lines {
			ended[line.number] = line
		}
		for _, r := range l.results {
			p := newPlan(l.options.seed, r.number)
			counts[l][p.kind]++
			if p.kind == ownEndpoint {
				continue
			}
			counts[l][p.fault]++
			if ends[p.fault] == nil {
				ends[p.fault] = map[string]int{}
			}
			end := fmt.Sprintf("%d without a log line", r.status)
			if line, ok := ended[r.number]; ok {
				end = strings.TrimSpace(fmt.Sprint(line.status, " ", line.code))
			}
			ends[p.fault][end]++
		}
	}
	heading("traffic")
	for k := range kinds {
		row(kind(k), func(l *lane) any { return counts[l][kind(k)] })
	}
	heading("\nfault", "ended as")
	for f := range faults {
		var all []string
		for _, end := range slices.Sorted(maps.Keys(ends[fault(f)])) {
			all = append(all, fmt.Sprintf("%s: %d", end, ends[fault(f)][end]))
		}
		row(fault(f), func(l *lane) any { return counts[l][fault(f)] }, strings.Join(all, ", "))
	}
}

// reportFigures tells what was counted and sampled.
func reportFigures(row rowFunc) {
	row("requests in log and metrics", func(l *lane) any { return len(l.lines) })
	row("of these in flight at SIGTERM", func(l *lane) any { return l.atEnd })
	row("attempts at the upstream", func(l *lane) any {
		n := 0
		for _, attempts := range l.upstream.attempts {
			n += attempts
		}
		return n
	})
	row("in line at once, at most", func(l *lane) any {
		most := 0.0
		for _, s := range l.samples {
			most = max(most, s.queued)
		}
		return most
	})
	row("late, on a machine too busy", func(l *lane) any { return l.late })
	row("MiB of requests verified", func(l *lane) any { return l.upstream.verified / mib })
	row("MiB of answers verified", func(l *lane) any {
		var n int64
		for _, r := range l.results {
			n += r.bytes
		}
		return n / mib
	})
	for _, q := range quantities {
		row(q.name, func(l *lane) any {
			t, ok := q.trend(l.samples, l.options.duration)
			if !ok {
				return "too short a run to tell"
			}
			return fmt.Sprintf("%v: by %.1f for certain", t, t.grown())
		})
	}
	row("RSS at its peak, MiB", func(l *lane) any { return fmt.Sprintf("%.1f", l.after.peak) })
	row("goroutines at rest", func(l *lane) any { return fmt.Sprintf("%v, then %v", l.before.goroutines, l.after.goroutines) })
	row("descriptors at rest", func(l *lane) any { return fmt.Sprintf("%v, then %v", l.before.descriptors, l.after.descriptors) })
}
