package main

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// A column of a table is one figure of each contestant.
type column struct{ work, figure, title string }

// published is the table of docs/performance.md.
var published = []column{
	{"small32", cpuPerRequest, "CPU µs per small request"},
	{"small32", perSecond, perSecond},
	{"small32", p99, p99},
	{"post10", megabytes, "10 MiB POST, MB/s"},
	{"get10", megabytes, "10 MiB answer, MB/s"},
	{"streams500", cpuPerEvent, "CPU µs per event"},
	{"streams500", kbPerStream, "KB per stream"},
	{"process", idleRSS, "idle MB"},
}

// text returns all tables, in Markdown: that of docs/performance.md and one for each workload; then the limits.
func (r *report) text() string {
	var b strings.Builder
	b.WriteString(r.head())
	r.table(&b, "docs/performance.md", published)
	for _, w := range append(workloads, processWork) {
		var columns []column
		for _, name := range w.columns {
			columns = append(columns, column{w.name, name, name})
		}
		r.table(&b, fmt.Sprintf("%s (%s)", w.title, w.name), columns)
	}
	b.WriteString("\n")
	for _, v := range judge(r) {
		fmt.Fprintf(&b, "%-9s  %5s  %s\n", v.state, format(v.Value), v.Limit)
	}
	return b.String()
}

// head says how to read the figures, and whether to believe them.
func (r *report) head() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d processors, %s. The proxy's figure divided by this contestant's, the median of the ratios of %d rounds; "+
		"in brackets the contestant's own figure, the median.\n", r.CPUs, r.Go, len(r.Others))
	fmt.Fprintln(&b, "The proxy logs every request (LOG_LEVEL=info) to a pipe; the others write no access log.")
	var shares []string
	noisy := false
	for _, n := range r.Others {
		shares = append(shares, fmt.Sprintf("%.0f, %.0f", n.Before*100, n.During*100))
		noisy = noisy || max(n.Before, n.During) > quiet
	}
	fmt.Fprintf(&b, "What others used of the machine, %% before and during each round: %s.\n", strings.Join(shares, "; "))
	if noisy {
		fmt.Fprintf(&b, "NOISY: that is more than %.0f %%. Don't quote these figures.\n", quiet*100)
	}
	return b.String()
}

// table writes a row for each contestant that has done the work of the first column; without any there is no table.
func (r *report) table(b *strings.Builder, title string, columns []column) {
	measured := r.measured(columns[0].work)
	if len(measured) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s\n\n", title)
	table := tabwriter.NewWriter(b, 0, 0, 1, ' ', 0)
	row := func(first string, cell func(column) string) {
		fmt.Fprintf(table, "| %s", first)
		for _, c := range columns {
			fmt.Fprintf(table, "\t| %s", cell(c))
		}
		fmt.Fprintln(table, "\t|")
	}
	row("", func(c column) string { return c.title })
	row("---", func(column) string { return "---" })
	for _, contestant := range measured {
		row(contestant, func(c column) string { return r.cell(contestant, c) })
	}
	table.Flush() // into b: can't fail
}

// cell is what the subject's figure is in proportion to a contestant's, and that itself.
func (r *report) cell(contestant string, c column) string {
	f := r.at(c.work, contestant, c.figure)
	alone := contestant == subject(c.work) || slices.Contains([]string{arrived, addedP50, addedP99}, c.figure) // their ratios say nothing
	if alone || f.Ratio == 0 {
		return format(f.Median)
	}
	return fmt.Sprintf("%.2f (%s)", f.Ratio, format(f.Median))
}

// format writes v with three digits that count.
func format(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	decimals := 3
	for rest := math.Abs(v); rest >= 1 && decimals > 0; rest /= 10 {
		decimals--
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}
