package main

import (
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
)

// report tells what happened, and returns an error that tells what was wrong.
func report(out io.Writer, o options, lanes []*lane) error {
	var b strings.Builder
	build := "released build"
	switch {
	case o.race:
		build = "build with the race detector"
	case o.binary != "":
		build = o.binary
	}
	fmt.Fprintf(&b, "soak: %v, seed %d, %d clients, %s, %d processors, %s\n",
		o.duration, o.seed, o.clients, build, runtime.NumCPU(), runtime.Version())
	fmt.Fprintf(&b, "two proxies, with an upstream of HTTP/2 and one of HTTP/1.1; the machine stood still %v\n\n", lanes[0].stalls)
	table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	printTraffic(table, lanes)
	printFigures(table, lanes)
	table.Flush() // into b: can't fail
	wrong := verdict(&b, lanes)
	if _, err := io.WriteString(out, b.String()); err != nil {
		return err
	}
	if wrong > 0 {
		return fmt.Errorf("%d things are wrong", wrong)
	}
	return nil
}

// A tally counts a lane's requests.
type tally struct {
	kinds  [len(kinds)]int
	faults [faultCount]int
	ends   [faultCount]map[string]int // by the fault, and how the requests ended
}

// tally counts l's requests.
func (l *lane) tally() (t tally) {
	ended := map[int]logLine{}
	for _, line := range l.lines {
		ended[line.number] = line
	}
	for _, r := range l.results {
		p := newPlan(l.options.seed, r.number)
		t.kinds[p.kind]++
		if p.kind == ownEndpoint {
			continue
		}
		t.faults[p.fault]++
		if t.ends[p.fault] == nil {
			t.ends[p.fault] = map[string]int{}
		}
		t.ends[p.fault][outcome(r, ended[r.number])]++
	}
	return t
}

// printTraffic counts the requests by kind, and by what went wrong and how they ended.
func printTraffic(w io.Writer, lanes []*lane) {
	var tallies []tally
	for _, l := range lanes {
		tallies = append(tallies, l.tally())
	}
	fmt.Fprint(w, "traffic"+columns(lanes)+"\n")
	for k := range kinds {
		fmt.Fprint(w, kind(k))
		for _, t := range tallies {
			fmt.Fprintf(w, "\t%d", t.kinds[k])
		}
		fmt.Fprintln(w)
	}
	fmt.Fprint(w, "\nfault"+columns(lanes)+"\tended as\n")
	for f := range faultCount {
		fmt.Fprint(w, f)
		ends := map[string]int{}
		for _, t := range tallies {
			fmt.Fprintf(w, "\t%d", t.faults[f])
			for end, n := range t.ends[f] {
				ends[end] += n
			}
		}
		var all []string
		for _, end := range slices.Sorted(maps.Keys(ends)) {
			all = append(all, fmt.Sprintf("%s: %d", end, ends[end]))
		}
		fmt.Fprintf(w, "\t%s\n", strings.Join(all, ", "))
	}
	fmt.Fprintln(w)
}

// columns are the heads of the lanes' columns.
func columns(lanes []*lane) (heads string) {
	for _, l := range lanes {
		heads += "\t" + l.name
	}
	return heads
}

// outcome names how a request ended.
func outcome(r result, line logLine) string {
	switch {
	case line.proxyID == "":
		return fmt.Sprintf("%d without a log line", r.status)
	case line.code == "":
		return fmt.Sprint(line.status)
	}
	return fmt.Sprintf("%d %s", line.status, line.code)
}

// printFigures tells what was counted and sampled.
func printFigures(w io.Writer, lanes []*lane) {
	fmt.Fprint(w, "figure"+columns(lanes)+"\n")
	row := func(name string, value func(l *lane) string) {
		fmt.Fprint(w, name)
		for _, l := range lanes {
			fmt.Fprintf(w, "\t%s", value(l))
		}
		fmt.Fprintln(w)
	}
	row("requests in log and metrics", func(l *lane) string { return fmt.Sprint(len(l.lines)) })
	row("attempts at the upstream", func(l *lane) string {
		n, _ := l.upstream.totals()
		return fmt.Sprint(n)
	})
	row("repeated by the proxy", func(l *lane) string { return fmt.Sprint(count(l.lines).retries) })
	row("in line at once, at most", func(l *lane) string {
		most := 0.0
		for _, s := range l.samples {
			most = max(most, s.queued)
		}
		return fmt.Sprint(most)
	})
	row("late, on a machine too busy", func(l *lane) string { return fmt.Sprint(l.late) })
	row("MiB of requests verified", func(l *lane) string {
		_, n := l.upstream.totals()
		return fmt.Sprint(n / mib)
	})
	row("MiB of answers verified", func(l *lane) string {
		var n int64
		for _, r := range l.results {
			n += r.bytes
		}
		return fmt.Sprint(n / mib)
	})
	for _, q := range quantities {
		row(q.name, func(l *lane) string {
			t, ok := q.trend(l.samples, l.options.duration)
			if !ok {
				return "too short a run to tell"
			}
			return fmt.Sprintf("%v: by %.1f for certain", t, t.grown())
		})
	}
	row("RSS at its peak, MiB", func(l *lane) string { return fmt.Sprintf("%.1f", l.peak) })
	row("goroutines at rest", func(l *lane) string { return fmt.Sprintf("%v, then %v", l.before.goroutines, l.after.goroutines) })
	row("descriptors at rest", func(l *lane) string { return fmt.Sprintf("%v, then %v", l.before.descriptors, l.after.descriptors) })
}

// verdict lists what is wrong, and returns how much there is.
func verdict(w io.Writer, lanes []*lane) (wrong int) {
	for _, l := range lanes {
		first, n := l.problems.all()
		for _, problem := range first {
			fmt.Fprintf(w, "\nWRONG: %s", problem)
		}
		if more := n - len(first); more > 0 {
			fmt.Fprintf(w, "\nWRONG: %s: %d more", l.name, more)
		}
		wrong += n
	}
	if wrong == 0 {
		fmt.Fprint(w, "\nNot one byte was wrong, all counts add up, and nothing grows of what was seen for long enough.")
	}
	fmt.Fprintln(w)
	return wrong
}
