package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
)

// head says how to read the figures, and whether to believe them.
func (r *results) head() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d processors, %s. The proxy's figure divided by this contestant's, the median of the ratios of %d rounds; "+
		"in brackets the contestant's own figure, the median.\n", runtime.NumCPU(), runtime.Version(), len(r.others))
	fmt.Fprintln(&b, "The proxy logs every request (LOG_LEVEL=info) to a pipe; the others write no access log.")
	shares, noisy := make([]string, len(r.others)), false
	for i, n := range r.others {
		shares[i] = fmt.Sprintf("%.0f, %.0f", n.Before*100, n.During*100)
		noisy = noisy || max(n.Before, n.During) > quiet
	}
	fmt.Fprintf(&b, "What others used of the machine, %% before and during each round: %s.\n", strings.Join(shares, "; "))
	if noisy {
		fmt.Fprintf(&b, "NOISY: that is more than %.0f %%. Don't quote these figures.\n", quiet*100)
	}
	return b.String()
}

// text returns a table for each workload, then the limits.
func (r *results) text(verdicts []verdict) string {
	var b strings.Builder
	b.WriteString(r.head())
	for _, w := range r.works {
		r.printWorkload(&b, w)
	}
	printLimits(&b, verdicts)
	return b.String()
}

func (r *results) printWorkload(b *strings.Builder, w workload) {
	measured := r.measured(w.name)
	if len(measured) == 0 {
		return
	}
	fmt.Fprintf(b, "\n%s (%s)\n", w.title, w.name)
	table := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "\t%s\n", strings.Join(w.columns, "\t"))
	for _, c := range measured {
		fmt.Fprint(table, c)
		for _, column := range w.columns {
			fmt.Fprintf(table, "\t%s", r.cell(w.name, c, column))
		}
		fmt.Fprintln(table)
	}
	table.Flush() // into b: can't fail
}

// cell is what the subject's figure is in proportion to a contestant's, and that
// itself.
func (r *results) cell(work, contestant, column string) string {
	s := format(r.value(work, contestant, column))
	ratio := r.ratio(work, contestant, column)
	if contestant == subject(work) || math.IsNaN(ratio) || column == arrived || column == addedP50 || column == addedP99 {
		return s
	}
	return fmt.Sprintf("%.2f (%s)", ratio, s)
}

// markdown returns the tables that README.md shows: a choice of all figures, and
// the work at a CPU limit.
func (r *results) markdown() string {
	var b strings.Builder
	b.WriteString(r.head())
	type figure struct{ work, column, title string }
	streams := streamsName(streamCounts[0])
	chosen := [][]figure{{ // a table each
		{"small32", cpuPerRequest, "CPU µs per small request"},
		{"small32", perSecond, perSecond},
		{"small32", p99, p99},
		{"post10", megabytes, "10 MiB POST, MB/s"},
		{"get10", megabytes, "10 MiB answer, MB/s"},
		{streams, cpuPerEvent, "CPU µs per event"},
		{streams, addedP50, "added to an event, p50 ms"},
		{streams, kbPerStream, "KB per stream"},
		{processName, idleRSS, "idle MB"},
	}}
	for _, percent := range quotaLoads {
		work := quotaName(percent)
		chosen = append(chosen, []figure{{work, cpuPerRequest, work + ": " + cpuPerRequest}, {work, p99, p99}, {work, quotaUsed, quotaUsed}})
	}
	for _, figures := range chosen {
		measured := r.measured(figures[0].work)
		if len(measured) == 0 {
			continue
		}
		header, rule := "\n|", "|---|"
		for _, f := range figures {
			header, rule = header+" | "+f.title, rule+"---|"
		}
		fmt.Fprintf(&b, "%s |\n%s\n", header, rule)
		for _, c := range measured {
			fmt.Fprintf(&b, "| %s |", c)
			for _, f := range figures {
				fmt.Fprintf(&b, " %s |", r.cell(f.work, c, f.column))
			}
			fmt.Fprintln(&b)
		}
	}
	return b.String()
}

func printLimits(b *strings.Builder, verdicts []verdict) {
	if len(verdicts) == 0 {
		return
	}
	fmt.Fprintf(b, "\nlimits\n")
	table := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	for _, v := range verdicts {
		state := "missed"
		switch {
		case v.met:
			state = "ok"
		case v.collapsed:
			state = "collapsed"
		}
		fmt.Fprintf(table, "%s\t%s\t%v\n", state, format(v.value), v.limit)
	}
	table.Flush() // into b: can't fail
}

// format writes v with three digits that count.
func format(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "-"
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

// A jsonFigure is one figure in the JSON report.
type jsonFigure struct {
	Median float64   `json:"median"`
	Ratio  *float64  `json:"ratio,omitempty"` // ours to this one
	Rounds []float64 `json:"rounds"`
}

// A jsonLimit is one limit in the JSON report.
type jsonLimit struct {
	Limit string  `json:"limit"`
	Value float64 `json:"value"`
	Met   bool    `json:"met"`
}

// figures are all figures, by workload, contestant and column.
type figures map[string]map[string]map[string]jsonFigure

// A report is the JSON report.
type report struct {
	Others  []noise     `json:"others"`
	CPUs    int         `json:"cpus"`
	Go      string      `json:"go"`
	Figures figures     `json:"figures"`
	Limits  []jsonLimit `json:"limits"`
}

func (r *results) report(verdicts []verdict) report {
	report := report{Others: r.others, CPUs: runtime.NumCPU(), Go: runtime.Version(), Figures: figures{}}
	for _, w := range r.works {
		report.Figures[w.name] = map[string]map[string]jsonFigure{}
		for _, c := range r.contestants {
			report.Figures[w.name][c] = r.figures(w, c)
		}
	}
	for _, v := range verdicts {
		report.Limits = append(report.Limits, jsonLimit{v.limit.String(), v.value, v.met})
	}
	return report
}

func (r report) write(file string) error {
	out, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	if err := os.WriteFile(file, append(out, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	return nil
}

func (r *results) figures(w workload, contestant string) map[string]jsonFigure {
	all := map[string]jsonFigure{}
	for _, column := range w.columns {
		rounds := r.rounds(w.name, contestant, column)
		if len(rounds) == 0 {
			continue
		}
		f := jsonFigure{Median: median(rounds), Rounds: rounds}
		if ratio := r.ratio(w.name, contestant, column); !math.IsNaN(ratio) && !math.IsInf(ratio, 0) {
			f.Ratio = &ratio
		}
		all[column] = f
	}
	return all
}
