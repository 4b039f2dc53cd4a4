package main

import (
	"bytes"
	"sync"
	"time"
)

// gatherer lets many write while one goroutine passes on what has gathered meanwhile (group commit): a write costs its
// caller a copy, and one system call serves all that came during the one before. Order is kept. While nothing is written
// it holds neither a goroutine nor a buffer.
type gatherer struct {
	out   func([]byte) error // writes all that it is given; called by one goroutine at a time
	limit int                // bytes that may wait, besides as many under way; a larger write is taken if nothing else waits

	mu      sync.Mutex
	moved   sync.Cond     // what waited is under way, or all is done; its lock is mu
	waiting *bytes.Buffer // nil if nothing waits
	busy    bool          // pass runs
	err     error         // the first that out returned; nothing goes out after it
}

// gatherBuffers are empty buffers to use again.
var gatherBuffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// newGatherer returns a gatherer in front of out.
func newGatherer(limit int, out func([]byte) error) *gatherer {
	g := &gatherer{out: out, limit: limit}
	g.moved.L = &g.mu
	return g
}

// add has p passed on, and waits for room if there is none; it may be reused afterwards. Its error is one that
// an earlier call of out returned.
func (g *gatherer) add(p []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.err == nil && !g.fits(len(p)) {
		g.moved.Wait()
	}
	g.append(p)
	return g.err
}

// tryAdd has p passed on if there is room for it.
func (g *gatherer) tryAdd(p []byte) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.fits(len(p)) {
		return false
	}
	g.append(p)
	return true
}

// fits reports whether n bytes more may wait: any number if nothing does yet. The caller holds g.mu.
func (g *gatherer) fits(n int) bool { return g.waiting == nil || g.waiting.Len()+n <= g.limit }

// append adds p to what waits. The caller holds g.mu.
func (g *gatherer) append(p []byte) {
	if g.err != nil {
		return
	}
	if g.waiting == nil {
		g.waiting = gatherBuffers.Get().(*bytes.Buffer)
	}
	g.waiting.Write(p)
	if !g.busy {
		g.busy = true
		go g.pass()
	}
}

// pass calls out until nothing waits.
func (g *gatherer) pass() {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer g.moved.Broadcast()
	for g.waiting != nil && g.err == nil {
		taken := g.waiting
		g.waiting = nil
		g.moved.Broadcast()
		g.mu.Unlock()
		err := g.out(taken.Bytes())
		if taken.Cap() <= 2*g.limit {
			taken.Reset()
			gatherBuffers.Put(taken)
		}
		g.mu.Lock()
		g.err = err
	}
	g.waiting, g.busy = nil, false
}

// state reports whether something waits or is under way, and out's first error.
func (g *gatherer) state() (busy bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.busy, g.err
}

// flush waits until everything was passed on, for d at most, and reports whether it was.
func (g *gatherer) flush(d time.Duration) bool {
	late := false
	defer time.AfterFunc(d, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		late = true
		g.moved.Broadcast()
	}).Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.busy && !late {
		g.moved.Wait()
	}
	return !g.busy
}
