package main

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"runtime"
	"slices"

	"gonum.org/v1/gonum/stat"
)

// A report is all figures of a run, and the file that -json writes and -from reads.
type report struct {
	Others  []noise                                  `json:"others"` // by round
	CPUs    int                                      `json:"cpus"`
	Go      string                                   `json:"go"`
	Figures map[string]map[string]map[string]*figure `json:"figures"` // by workload, contestant and column
	Limits  []verdict                                `json:"limits"`
}

// A figure is what all rounds have measured.
type figure struct {
	Median float64   `json:"median"`
	Ratio  float64   `json:"ratio,omitempty"` // the subject's figure to this one; 0: unknown
	Rounds []float64 `json:"rounds"`
}

func newReport() *report {
	return &report{CPUs: runtime.NumCPU(), Go: runtime.Version(), Figures: map[string]map[string]map[string]*figure{}}
}

// add takes what a round has measured. What is unknown is left out.
func (r *report) add(work, contestant string, measured figures) {
	if r.Figures[work] == nil {
		r.Figures[work] = map[string]map[string]*figure{}
	}
	if r.Figures[work][contestant] == nil {
		r.Figures[work][contestant] = map[string]*figure{}
	}
	for column, v := range measured {
		if f := r.at(work, contestant, column); !math.IsNaN(v) {
			f.Rounds = append(f.Rounds, v)
			r.Figures[work][contestant][column] = &f
		}
	}
}

// at returns a figure. If there is none, its median is NaN.
func (r *report) at(work, contestant, column string) figure {
	if f := r.Figures[work][contestant][column]; f != nil {
		return *f
	}
	return figure{Median: math.NaN()}
}

// measured returns the contestants that have a figure of this work, in the order of the tables.
func (r *report) measured(work string) []string {
	return slices.DeleteFunc(contestantNames(), func(c string) bool { return len(r.Figures[work][c]) == 0 })
}

// summarize compares rounds, once all are added. What the machine did in a round concerns all contestants: ratios and differences
// are of one round each.
func (r *report) summarize() {
	for _, work := range []string{"streams500", "streams2000"} {
		for _, c := range r.measured(work) {
			for added, column := range map[string]string{addedP50: p50, addedP99: p99} {
				for _, pair := range r.pairs(work, c, direct, column) {
					r.add(work, c, figures{added: pair[0] - pair[1]})
				}
			}
		}
	}
	for work, contestants := range r.Figures {
		for c, columns := range contestants {
			for column, f := range columns {
				var ratios []float64
				for _, pair := range r.pairs(work, subject(work), c, column) {
					ratios = append(ratios, pair[0]/pair[1])
				}
				f.Median = median(f.Rounds)
				if ratio := median(ratios); !math.IsNaN(ratio) && !math.IsInf(ratio, 0) {
					f.Ratio = ratio
				}
			}
		}
	}
	r.Limits = judge(r)
}

// pairs returns the measurements of a figure of two contestants, round by round.
func (r *report) pairs(work, a, b, column string) (all [][2]float64) {
	ofA, ofB := r.at(work, a, column).Rounds, r.at(work, b, column).Rounds
	for i := range min(len(ofA), len(ofB)) {
		all = append(all, [2]float64{ofA[i], ofB[i]})
	}
	return all
}

// median returns the middle value, or the mean of the two middle ones; NaN if there are no values.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	return stat.Mean(sorted[(len(sorted)-1)/2:len(sorted)/2+1], nil)
}

func readReport(file string) (*report, error) {
	r := &report{}
	in, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(in, r)
	}
	if err != nil {
		return nil, fmt.Errorf("reading the figures of %s: %w", file, err)
	}
	return r, nil
}

func (r *report) write(file string) error {
	out, err := json.MarshalIndent(r, "", "  ")
	if err == nil {
		err = os.WriteFile(file, append(out, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("writing the figures: %w", err)
	}
	return nil
}
