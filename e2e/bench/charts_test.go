package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestCharts draws made-up figures by way of a file, as -json and -from do.
func TestCharts(t *testing.T) {
	names := []string{ours, nginx, haproxyNoDelay}
	r := newResults([]contestant{{name: ours}, {name: nginx}, {name: haproxyNoDelay}, {name: direct}}, workloads())
	for i, name := range append(names, direct) {
		r.add("small32", name, []float64{float64(120 + i), 8000, 2, 3})
		r.add("post10", name, []float64{float64(700 + i), 1})
		r.add("streams500", name, []float64{41, 100, 5, 9, 1, 1, float64(50 + i), 100})
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "figures.json")
	if err := r.report(nil).write(file); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(dir, "charts")
	if err := redraw(file, folder); err != nil {
		t.Fatal(err)
	}
	for name, values := range map[string][]string{
		"performance-cpu.svg":     {"120", "121", "122"},
		"performance-large.svg":   {"700", "701", "702"}, // a panel of uploads, none of answers
		"performance-streams.svg": {"50.0", "51.0", "52.0"},
		"performance-events.svg":  {"41.0"},
	} {
		t.Run(name, func(t *testing.T) {
			texts := svgTexts(t, filepath.Join(folder, name))
			for _, want := range append(values, names...) {
				if !slices.Contains(texts, want) {
					t.Errorf("no %q among %q", want, texts)
				}
			}
			if slices.Contains(texts, direct) {
				t.Errorf("%q is no contestant: %q", direct, texts)
			}
		})
	}
}

// svgTexts returns the texts in an SVG file.
func svgTexts(t *testing.T, file string) []string {
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var texts []string
	for decoder := xml.NewDecoder(f); ; {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return texts
		}
		if err != nil {
			t.Fatal(err)
		}
		if text, ok := token.(xml.CharData); ok {
			texts = append(texts, string(text))
		}
	}
}
