package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

// errLeft is the cause with which the explorer's callers are cancelled.
var errLeft = errors.New("left")

// gateCaller is one caller of a gate under exploration.
type gateCaller struct {
	n      int64
	leave  context.CancelCauseFunc
	result chan error
}

// gateWorld is a gate, those who wait for it in arrival order, and those who hold units of it.
type gateWorld struct {
	t       *testing.T
	gate    *gate
	weights []int64 // of those who have not arrived yet
	waiting []*gateCaller
	holding []*gateCaller
	script  []string // what has happened
	raced   [2]int   // grants that met a cancellation: how many ended as a grant, and as an error
}

// fail ends the test with what led to the failure.
func (w *gateWorld) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Fatalf("%s\nafter %s", fmt.Sprintf(format, args...), strings.Join(w.script, ", "))
}

// arrive lets the next caller ask.
func (w *gateWorld) arrive() {
	n := w.weights[0]
	w.weights = w.weights[1:]
	w.script = append(w.script, fmt.Sprintf("arrive(%d)", n))
	ctx, leave := context.WithCancelCause(context.Background())
	c := &gateCaller{n: n, leave: leave, result: make(chan error, 1)}
	go func() { c.result <- w.gate.acquire(ctx, n) }()
	w.waiting = append(w.waiting, c)
	w.settle(nil)
}

// release has the i-th holder give its units back; a caller, if not nil, leaves at the same moment,
// first or second.
func (w *gateWorld) release(i int, leaver *gateCaller, first bool) {
	holder := w.holding[i]
	w.holding = slices.Delete(w.holding, i, i+1)
	w.script = append(w.script, fmt.Sprintf("release(%d)", holder.n))
	if leaver != nil {
		w.script = append(w.script, fmt.Sprintf("and at once, before it: %t, leave(%d)", first, leaver.n))
	}
	if leaver != nil && first {
		leaver.leave(errLeft)
	}
	w.gate.release(holder.n)
	if leaver != nil && !first {
		leaver.leave(errLeft)
	}
	holder.leave(nil)
	w.settle(leaver)
}

// leave cancels the i-th of those who wait.
func (w *gateWorld) leave(i int) {
	c := w.waiting[i]
	w.script = append(w.script, fmt.Sprintf("leave(%d)", c.n))
	c.leave(errLeft)
	w.settle(c)
}

// settle waits until nobody moves, and compares what happened with what should have: callers are
// let in from the head of the line, as far as the units reach. leaver is the one that was cancelled
// just now; if its turn has come too, either may win.
func (w *gateWorld) settle(leaver *gateCaller) {
	w.t.Helper()
	synctest.Wait()
	free := w.gate.size
	for _, c := range w.holding {
		free -= c.n
	}
	if i := slices.Index(w.waiting, leaver); i >= 0 {
		before := int64(0)
		for _, c := range w.waiting[:i+1] {
			before += c.n
		}
		fits := before <= free
		select {
		case err := <-leaver.result:
			switch {
			case err == nil && !fits:
				w.fail("a caller that left was let in out of turn")
			case err != nil && err != errLeft:
				w.fail("the error is %v, want the cause of the context's end", err)
			case err == nil:
				leaver.result <- nil
				w.raced[0]++
			case fits:
				w.raced[1]++
				fallthrough
			default:
				w.waiting = slices.Delete(w.waiting, i, i+1)
			}
		default:
			w.fail("a caller that left still waits")
		}
	}
	for len(w.waiting) > 0 && w.waiting[0].n <= free {
		c := w.waiting[0]
		select {
		case err := <-c.result:
			if err != nil {
				w.fail("a caller got the error %v though it did not leave", err)
			}
		default:
			w.fail("the first in line, who wants %d, still waits with %d free", c.n, free)
		}
		free -= c.n
		w.holding, w.waiting = append(w.holding, c), w.waiting[1:]
	}
	for _, c := range w.waiting {
		if len(c.result) > 0 {
			w.fail("a caller that wants %d overtook the one before it, or more was given than there is", c.n)
		}
	}
	taken, waiting := w.gate.load()
	if taken != w.gate.size-free || w.gate.free != free || waiting != int64(len(w.waiting)) || w.gate.contended() != (waiting > 0) {
		w.fail("load() = %d taken, %d waiting; want %d and %d", taken, waiting, w.gate.size-free, len(w.waiting))
	}
	if w.gate.tryAcquire(1) != (free >= 1 && waiting == 0) {
		w.fail("tryAcquire(1) is wrong with %d free and %d waiting", free, waiting)
	} else if free >= 1 && waiting == 0 {
		w.gate.release(1)
	}
}

// step does one of all the things that can happen next; false if nothing can.
func (w *gateWorld) step(pick func(n int) int) bool {
	arrivals := min(1, len(w.weights))
	pairs := 2 * len(w.holding) * len(w.waiting)
	n := arrivals + len(w.holding) + len(w.waiting) + pairs
	if n == 0 {
		return false
	}
	i := pick(n)
	switch {
	case i < arrivals:
		w.arrive()
		return true
	case i < arrivals+len(w.holding):
		w.release(i-arrivals, nil, false)
		return true
	case i < n-pairs:
		w.leave(i - arrivals - len(w.holding))
		return true
	}
	i -= n - pairs
	w.release(i/2/len(w.waiting), w.waiting[i/2%len(w.waiting)], i%2 == 0)
	return true
}

// run lets everything happen in the order that pick chooses. In the end all must have been served.
func (w *gateWorld) run(pick func(n int) int) {
	w.t.Helper()
	for w.step(pick) {
	}
	if w.gate.free != w.gate.size || len(w.waiting) > 0 {
		w.fail("%d of %d units are free in the end", w.gate.free, w.gate.size)
	}
}

// everyChoice calls run again and again until pick(n) has returned each of 0 to n-1 at each place.
func everyChoice(run func(pick func(n int) int)) (runs int) {
	type choice struct{ taken, of int }
	var path []choice
	for {
		depth := 0
		run(func(n int) int {
			if depth == len(path) {
				path = append(path, choice{})
			}
			path[depth].of = n // may differ from the last run's, after a race
			depth++
			return min(path[depth-1].taken, n-1)
		})
		runs++
		path = path[:depth]
		for len(path) > 0 && path[len(path)-1].taken+1 >= path[len(path)-1].of {
			path = path[:len(path)-1]
		}
		if len(path) == 0 {
			return runs
		}
		path[len(path)-1].taken++
	}
}

// TestGateExhaustively tries every order of arrivals, departures and releases, with all weights.
func TestGateExhaustively(t *testing.T) {
	for _, row := range []struct {
		callers int
		size    int64
	}{
		{callers: 3, size: 3},
		{callers: 4, size: 2},
	} {
		t.Run(fmt.Sprintf("%d callers for %d", row.callers, row.size), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var raced [2]int
				runs := everyChoice(func(pick func(n int) int) {
					w := &gateWorld{t: t, gate: newGate(row.size)}
					for range row.callers {
						w.weights = append(w.weights, 1+int64(pick(int(row.size))))
					}
					w.run(pick)
					raced[0] += w.raced[0]
					raced[1] += w.raced[1]
				})
				t.Logf("%d runs; of the races between grant and departure %d ended as a grant, %d as a departure", runs, raced[0], raced[1])
				if raced[0] == 0 {
					t.Error("no race between grant and departure was seen")
				}
			})
		})
	}
}

// TestGateAtRandom does the same with more callers than can be tried exhaustively.
func TestGateAtRandom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for seed := range uint64(300) {
			random := rand.New(rand.NewPCG(seed, 0))
			w := &gateWorld{t: t, gate: newGate(10), script: []string{fmt.Sprintf("seed %d", seed)}}
			for range 20 {
				w.weights = append(w.weights, 1+random.Int64N(10))
			}
			w.run(random.IntN)
		}
	})
}

// TestGateOrder is the promise in a few words: a small request never overtakes a large one that waits.
func TestGateOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(10)
		if !g.tryAcquire(8) || g.tryAcquire(3) {
			t.Fatal("8 of 10 must be had at once, and then not 3 more")
		}
		var mu sync.Mutex
		var order []int64
		for _, n := range []int64{5, 1, 9, 1} {
			go func() {
				if err := g.acquire(context.Background(), n); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, n)
			}()
			synctest.Wait()
		}
		for _, row := range []struct {
			released int64
			want     []int64 // let in so far
		}{
			{released: 0, want: nil},
			{released: 2, want: nil}, // 4 are free, but the 5 comes first
			{released: 1, want: []int64{5}},
			{released: 1, want: []int64{5, 1}},
			{released: 4, want: []int64{5, 1}},
			{released: 5, want: []int64{5, 1, 9}},
			{released: 1, want: []int64{5, 1, 9, 1}},
		} {
			g.release(row.released)
			synctest.Wait()
			mu.Lock()
			if !slices.Equal(order, row.want) {
				t.Errorf("after %d more were released: %v were let in, want %v", row.released, order, row.want)
			}
			mu.Unlock()
		}
	})
}

// TestGateEndedContext: a context that has ended is no obstacle while units are free, as for any
// semaphore, but nobody waits with one.
func TestGateEndedContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(errLeft)
	g := newGate(1)
	if err := g.acquire(ctx, 1); err != nil {
		t.Errorf("with a unit free: %v", err)
	}
	if err := g.acquire(ctx, 1); err != errLeft {
		t.Errorf("without a free unit: %v, want %v", err, errLeft)
	}
	if taken, waiting := g.load(); taken != 1 || waiting != 0 {
		t.Errorf("%d taken, %d waiting; want 1 and 0", taken, waiting)
	}
}
