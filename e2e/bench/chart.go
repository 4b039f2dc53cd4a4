package main

import (
	"bytes"
	_ "embed"
	"errors"
	"os"
	"slices"
	"text/template"
)

// charted are the panels of docs/performance.svg, one below the other: a bar for each contestant's median.
var charted = []column{
	{"small32", cpuEach, "CPU time per small request, µs (lower is better)"},
	{"post10", megabytes, "10 MiB POST, MB/s (higher is better)"},
	{"get10", megabytes, "10 MiB answer, MB/s (higher is better)"},
	{"streams500", kbPerStream, "Memory per open stream, KB (lower is better)"},
	{"streams500", cpuEach, "CPU time per event of a stream, µs (lower is better)"},
}

//go:embed chart.svg.tmpl
var chart string

// A bar of the chart, in pixels; without a width it is the title of those that follow.
type bar struct {
	Y           int
	Name, Value string
	Width       float64
	Ours        bool
}

func (r *report) writeChart(file string) error {
	const line, longest = 25, 320
	var bars []bar
	y := 0
	for _, c := range charted {
		y += 3 * line / 2
		bars = append(bars, bar{Y: y, Name: c.title})
		names := slices.DeleteFunc(r.measured(c.work), func(name string) bool { return name == direct })
		most := 0.0
		for _, name := range names {
			most = max(most, r.median(c.work, name, c.figure))
		}
		for _, name := range names {
			y += line
			value := r.median(c.work, name, c.figure)
			bars = append(bars, bar{y, name, format(value), value / most * longest, name == ours})
		}
	}
	var svg bytes.Buffer
	err := template.Must(template.New("chart").Parse(chart)).Execute(&svg, map[string]any{"Height": y + line/2, "Bars": bars})
	return errors.Join(err, os.WriteFile(file, svg.Bytes(), 0o644))
}
