package main

import (
	"container/list"
	"context"
	"sync"
)

// gate is a weighted semaphore that serves in arrival order: who asks for much is not overtaken by those who ask for little,
// but by those who hold units already and need more (first in acquire). The zero value has no units; see newGate.
type gate struct {
	size int64

	mu      sync.Mutex
	free    int64
	waiting list.List // of *ticket, in arrival order
}

// ticket is one caller's place in the queue of a gate.
type ticket struct {
	n       int64
	granted chan struct{} // closed once n units are the caller's
}

// newGate returns a gate with size units to give out.
func newGate(size int64) *gate { return &gate{size: size, free: size} }

// tryAcquire takes n units if they are free and nobody waits.
func (g *gate) tryAcquire(n int64) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting.Len() > 0 || g.free < n {
		return false
	}
	g.free -= n
	return true
}

// acquire takes n units, waiting in line for them until ctx ends; its error is then ctx's cause, and nothing was taken. n must
// not exceed the gate's size. first is for who holds units already: it goes before all that wait, the latest such caller first,
// or else those could wait behind others for units that they themselves keep from them.
func (g *gate) acquire(ctx context.Context, n int64, first bool) error {
	t := &ticket{n: n, granted: make(chan struct{})}
	g.mu.Lock()
	join := g.waiting.PushBack
	if first {
		join = g.waiting.PushFront
	}
	place := join(t)
	g.grant()
	g.mu.Unlock()

	select {
	case <-t.granted:
		return nil
	case <-ctx.Done():
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-t.granted: // at the same moment
		return nil
	default:
		g.waiting.Remove(place)
		g.grant() // those behind may fit now
		return context.Cause(ctx)
	}
}

// release gives n units back.
func (g *gate) release(n int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.free += n
	g.grant()
}

// load returns the units that are taken and the callers that wait.
func (g *gate) load() (taken, waiting int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.size - g.free, int64(g.waiting.Len())
}

// contended reports whether someone waits.
func (g *gate) contended() bool {
	_, waiting := g.load()
	return waiting > 0
}

// grant serves the queue from its head as far as the free units reach. The caller holds g.mu.
func (g *gate) grant() {
	for front := g.waiting.Front(); front != nil; front = g.waiting.Front() {
		t := front.Value.(*ticket)
		if t.n > g.free {
			return
		}
		g.free -= t.n
		g.waiting.Remove(front)
		close(t.granted)
	}
}
