package main

import (
	"fmt"
	"math"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"gonum.org/v1/gonum/stat"
)

// A report is all figures of a run.
type report struct {
	others  []float64         // which part of the machine they used, by round
	figures map[key][]float64 // by round; what is unknown is left out
}

// A key names a figure.
type key struct{ work, contestant, figure string }

func newReport() *report { return &report{figures: map[key][]float64{}} }

// add takes what a round has measured.
func (r *report) add(work, contestant string, measured figures) {
	for figure, v := range measured {
		if k := (key{work, contestant, figure}); !math.IsNaN(v) {
			r.figures[k] = append(r.figures[k], v)
		}
	}
}

// median returns the median of all rounds; NaN if there are none.
func (r *report) median(work, contestant, figure string) float64 {
	return median(r.figures[key{work, contestant, figure}])
}

// between returns the median of what f makes of two contestants' figures in each round: what the machine did in it concerns both.
func (r *report) between(work, a, b, figure string, f func(a, b float64) float64) float64 {
	ofA, ofB := r.figures[key{work, a, figure}], r.figures[key{work, b, figure}]
	var all []float64
	for i := range min(len(ofA), len(ofB)) {
		all = append(all, f(ofA[i], ofB[i]))
	}
	return median(all)
}

// ratio returns the subject's figure to a contestant's.
func (r *report) ratio(work, contestant, figure string) float64 {
	return r.between(work, subject(work), contestant, figure, func(a, b float64) float64 { return a / b })
}

// median returns the middle value, or the mean of the two middle ones; NaN if there are no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return stat.Mean(sorted[(len(sorted)-1)/2:len(sorted)/2+1], nil)
}

// A column of a table is one figure of each contestant.
type column struct{ work, figure, title string }

// published is the table of docs/performance.md.
var published = []column{
	{"small32", cpuEach, "CPU µs per small request"},
	{"small32", perSecond, "requests/s"},
	{"small32", p99, p99},
	{"post10", megabytes, "10 MiB POST, MB/s"},
	{"get10", megabytes, "10 MiB answer, MB/s"},
	{"streams500", cpuEach, "CPU µs per event"},
	{"streams500", kbPerStream, "KB per stream"},
	{"process", idleRSS, "idle MB"},
}

// text says how to read the figures, and whether to believe them. Then it has all tables, in Markdown: that of
// docs/performance.md and one for each workload; then the limits.
func (r *report) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d processors, %s. The proxy's figure divided by this contestant's, the median of the ratios of %d rounds; "+
		"in brackets the contestant's own figure, the median.\n", runtime.NumCPU(), runtime.Version(), len(r.others))
	b.WriteString("The proxy logs every request (LOG_LEVEL=info) to a pipe; the others write no access log.\n")
	b.WriteString("What others used of the machine in each round:")
	for _, used := range r.others {
		fmt.Fprintf(&b, " %.0f %%", used*100)
	}
	b.WriteString("\n")
	if slices.Max(r.others) > quiet {
		fmt.Fprintf(&b, "NOISY: that is more than %.0f %%. Don't quote these figures.\n", quiet*100)
	}
	r.table(&b, "docs/performance.md", published)
	for _, w := range append(workloads, processWork) {
		var columns []column
		for _, name := range w.columns {
			columns = append(columns, column{w.name, name, name})
		}
		r.table(&b, fmt.Sprintf("%s: %s", w.name, w.title), columns)
	}
	b.WriteString("\n")
	r.judge(func(l limit, value float64, state string) {
		fmt.Fprintf(&b, "%-9s  %5s  %v\n", state, format(value), l)
	})
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

// measured returns the contestants that have done this work, in the order of the tables.
func (r *report) measured(work string) (names []string) {
	done := map[string]bool{}
	for k := range r.figures {
		done[k.contestant] = done[k.contestant] || k.work == work
	}
	for _, c := range contestants {
		if done[c.name] {
			names = append(names, c.name)
		}
	}
	return names
}

// cell is what the subject's figure is in proportion to a contestant's, and that itself; or that alone.
func (r *report) cell(contestant string, c column) string {
	if figure, ok := strings.CutPrefix(c.figure, added); ok {
		return format(r.between(c.work, contestant, direct, figure, func(a, b float64) float64 { return a - b }))
	}
	own, ratio := format(r.median(c.work, contestant, c.figure)), r.ratio(c.work, contestant, c.figure)
	if math.IsNaN(ratio) || contestant == subject(c.work) {
		return own
	}
	return fmt.Sprintf("%.2f (%s)", ratio, own)
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
