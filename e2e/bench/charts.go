package main

import (
	"bytes"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// charts are the panels of each file, one below the other: a bar for each contestant's median.
var charts = map[string][]column{
	"performance-cpu.svg": {{"small32", cpuPerRequest, "CPU time per small request, µs (lower is better)"}},
	"performance-large.svg": {
		{"post10", megabytes, "10 MiB POST, MB/s (higher is better)"},
		{"get10", megabytes, "10 MiB answer, MB/s (higher is better)"},
	},
	"performance-streams.svg": {{"streams500", kbPerStream, "Memory per open stream, KB (lower is better)"}},
	"performance-events.svg":  {{"streams500", cpuPerEvent, "CPU time per event of a stream, µs (lower is better)"}},
}

// These can be read on white and on GitHub's dark background alike, which there is no telling from within an image: the site's
// theme need not be the system's.
var (
	textColor  = color.RGBA{0x77, 0x7b, 0x80, 0xff}
	oursColor  = color.RGBA{0xd9, 0x77, 0x06, 0xff}
	otherColor = color.RGBA{0x5f, 0x8d, 0xb8, 0xff}
)

const (
	chartWidth  = 480
	titleHeight = 40
	barHeight   = 16
	barDistance = 25
	margin      = 8
)

// writeCharts draws all charts that there are figures for into folder.
func (r *report) writeCharts(folder string) error {
	for file, panels := range charts {
		var plots []*plot.Plot
		most := 0 // bars in one of them
		for _, panel := range panels {
			if names := r.bars(panel); len(names) > 0 {
				plots = append(plots, r.drawPanel(panel, names))
				most = max(most, len(names))
			}
		}
		if plots == nil {
			continue
		}
		image := vgsvg.New(chartWidth, vg.Length(len(plots)*(titleHeight+most*barDistance)+2*margin))
		tiles := draw.Tiles{Rows: len(plots), Cols: 1, PadY: barHeight, PadTop: margin, PadBottom: margin, PadLeft: margin, PadRight: margin}
		for row, p := range plots {
			p.Draw(tiles.At(draw.New(image), 0, row))
		}
		var svg bytes.Buffer
		if _, err := image.WriteTo(&svg); err != nil {
			return fmt.Errorf("drawing %s: %w", file, err)
		}
		// The library names no font for systems without its own; these are as wide.
		out := bytes.ReplaceAll(svg.Bytes(), []byte("font-family:Liberation Sans;"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif;"))
		if err := os.WriteFile(filepath.Join(folder, file), out, 0o644); err != nil {
			return fmt.Errorf("drawing charts: %w", err)
		}
	}
	return nil
}

// bars returns the contestants, without direct, that have the panel's figure, from below, as the library counts.
func (r *report) bars(panel column) []string {
	names := slices.DeleteFunc(r.measured(panel.work), func(c string) bool {
		return c == direct || r.at(panel.work, c, panel.figure).Rounds == nil
	})
	slices.Reverse(names)
	return names
}

func (r *report) drawPanel(panel column, names []string) *plot.Plot {
	sans := font.Font{Typeface: "Liberation", Variant: "Sans"}
	drawn := plot.New()
	drawn.BackgroundColor = nil
	drawn.Title.Text = panel.title
	drawn.Title.Padding = barHeight / 2
	drawn.Title.TextStyle.Font = font.From(sans, 14)
	drawn.Title.TextStyle.Color = textColor
	drawn.HideX()
	drawn.Y.Tick.Label.Font = font.From(sans, 12)
	drawn.Y.Tick.Label.Color = textColor
	drawn.NominalY(names...)
	for i, name := range names {
		value := r.at(panel.work, name, panel.figure).Median
		bar := &plotter.BarChart{Values: plotter.Values{value}, Width: barHeight, XMin: float64(i), Horizontal: true, Color: otherColor}
		if name == ours {
			bar.Color = oursColor
		}
		style := drawn.Y.Tick.Label
		style.XAlign = draw.XLeft
		level := style.FontExtents().Descent // as high as the names
		drawn.Add(bar, &plotter.Labels{
			XYs: plotter.XYs{{X: value, Y: float64(i)}}, Labels: []string{format(value)},
			TextStyle: []draw.TextStyle{style}, Offset: vg.Point{X: 5, Y: level},
		})
	}
	drawn.X.Min = 0
	return drawn
}
