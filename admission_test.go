package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
)

// errLeft is the cause with which callers of a gate are cancelled.
var errLeft = errors.New("left")

// gateCaller is one caller of a gate.
type gateCaller struct {
	n      int64
	first  bool
	leave  context.CancelCauseFunc
	result chan error
}

// TestGate has callers come, leave and give back at random, also at the same moment, and holds the gate against what it
// promises: it lets in from the head of the line, as far as the units reach, and nobody else.
func TestGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		raced := 0 // those who were let in as they left
		for seed := range uint64(1000) {
			random := rand.New(rand.NewPCG(seed, 0))
			g := newGate(1 + random.Int64N(10))
			var waiting, holding []*gateCaller
			var leaver *gateCaller
			come := func() {
				c := &gateCaller{n: 1 + random.Int64N(g.size), first: random.IntN(4) == 0, result: make(chan error, 1)}
				var ctx context.Context
				ctx, c.leave = context.WithCancelCause(context.Background())
				go func() { c.result <- g.acquire(ctx, c.n, c.first) }()
				if c.first {
					waiting = slices.Insert(waiting, 0, c)
				} else {
					waiting = append(waiting, c)
				}
			}
			leave := func() {
				if len(waiting) > 0 {
					leaver = waiting[random.IntN(len(waiting))]
					leaver.leave(errLeft)
				}
			}
			giveBack := func() {
				if len(holding) > 0 {
					i := random.IntN(len(holding))
					g.release(holding[i].n)
					holding[i].leave(nil)
					holding = slices.Delete(holding, i, i+1)
				}
			}
			moves := [][]func(){{come}, {come}, {leave}, {giveBack}, {leave, giveBack}, {giveBack, leave}}
			for step := range 60 {
				leaver = nil
				for _, move := range moves[random.IntN(len(moves))] {
					move()
				}
				synctest.Wait()

				free := g.size
				for _, c := range holding {
					free -= c.n
				}
				for rest := waiting; len(rest) > 0; rest = rest[1:] {
					c, turn := rest[0], rest[0] == waiting[0] && rest[0].n <= free
					got := "it waits"
					select {
					case err := <-c.result:
						got = errorText(err)
					default:
					}
					if !(got == "" && turn || got == "left" && c == leaver || got == "it waits" && !turn && c != leaver) {
						t.Fatalf("seed %d, step %d: a caller wants %d, %q; its turn: %t; it left: %t", seed, step, c.n, got, turn, c == leaver)
					}
					if got != "it waits" {
						waiting = slices.DeleteFunc(slices.Clone(waiting), func(other *gateCaller) bool { return other == c })
					}
					if got == "" {
						free -= c.n
						holding = append(holding, c)
						if c == leaver {
							raced++
						}
					}
				}
				taken, inLine := g.load()
				had := g.tryAcquire(1)
				if had {
					g.release(1)
				}
				if taken != g.size-free || inLine != int64(len(waiting)) || g.contended() != (inLine > 0) || had != (free > 0 && inLine == 0) {
					t.Fatalf("seed %d, step %d: %d taken, %d wait, one more is had: %t; want %d and %d", seed, step, taken, inLine, had, g.size-free, len(waiting))
				}
			}
			for _, c := range append(waiting, holding...) {
				c.leave(nil)
			}
			synctest.Wait()
		}
		holds(t, raced > 0, "nobody whose turn came when it left was let in")
	})
}
