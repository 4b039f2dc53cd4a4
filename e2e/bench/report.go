package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"strings"
	"text/tabwriter"
)

// print writes a table for each workload, then the limits.
func (r *results) print(out io.Writer, verdicts []verdict) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%d processors, %s; medians; in brackets the proxy's figure divided by this one\n", runtime.NumCPU(), runtime.Version())
	for _, w := range r.works {
		r.printWorkload(&b, w)
	}
	printLimits(&b, verdicts)
	_, err := io.WriteString(out, b.String())
	return err
}

func (r *results) printWorkload(b *strings.Builder, w workload) {
	fmt.Fprintf(b, "\n%s (%s)\n", w.title, w.name)
	table := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "\t%s\n", strings.Join(w.columns, "\t"))
	for _, c := range r.contestants {
		fmt.Fprint(table, c)
		for _, column := range w.columns {
			fmt.Fprintf(table, "\t%s", r.cell(w.name, c, column))
		}
		fmt.Fprintln(table)
	}
	table.Flush() // into b: can't fail
}

// cell is a figure and what ours is in proportion to it.
func (r *results) cell(work, contestant, column string) string {
	s := format(r.value(work, contestant, column))
	ratio := r.ratio(work, contestant, column)
	if contestant == ours || math.IsNaN(ratio) || column == arrived || column == addedP50 || column == addedP99 {
		return s
	}
	return fmt.Sprintf("%s (%.2f)", s, ratio)
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

// writeJSON writes all figures, by workload, contestant and column.
func (r *results) writeJSON(file string, verdicts []verdict) error {
	report := struct {
		CPUs    int                                         `json:"cpus"`
		Go      string                                      `json:"go"`
		Figures map[string]map[string]map[string]jsonFigure `json:"figures"`
		Limits  []jsonLimit                                 `json:"limits"`
	}{CPUs: runtime.NumCPU(), Go: runtime.Version(), Figures: map[string]map[string]map[string]jsonFigure{}}
	for _, w := range r.works {
		report.Figures[w.name] = map[string]map[string]jsonFigure{}
		for _, c := range r.contestants {
			report.Figures[w.name][c] = r.figures(w, c)
		}
	}
	for _, v := range verdicts {
		report.Limits = append(report.Limits, jsonLimit{v.limit.String(), v.value, v.met})
	}
	out, err := json.MarshalIndent(report, "", "  ")
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
