package main

import (
	"fmt"
	"sync"
)

// problemsKept is how many problems are told in full: of a thousand, the first tell
// what is wrong.
const problemsKept = 20

// problems collects what went wrong in a lane.
type problems struct {
	lane string

	mu    sync.Mutex
	first []string
	count int
}

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
	return append([]string(nil), p.first...), p.count
}
