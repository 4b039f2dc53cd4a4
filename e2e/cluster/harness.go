package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"
)

// test is to a criterion what testing.T is to a test. It belongs to one goroutine: what runs beside that one has a test of its own,
// from try.
type test struct {
	*world
	ctx      context.Context
	measured string
	errs     []error
	cleanups []func()
}

// try runs f, until it ends or gives up, and then its cleanups. It returns what was measured, and all that failed.
func (w *world) try(ctx context.Context, f func(*test)) (measured string, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := &test{world: w, ctx: ctx}
	done := make(chan struct{})
	go func() { // its own goroutine, as giving up ends it
		defer close(done)
		defer t.cleanUp()
		f(t)
	}()
	<-done
	return t.measured, errors.Join(t.errs...)
}

// cleanup has f run at the end, before those of earlier calls.
func (t *test) cleanup(f func()) { t.cleanups = append(t.cleanups, f) }

func (t *test) cleanUp() {
	if n := len(t.cleanups); n > 0 {
		f := t.cleanups[n-1]
		t.cleanups = t.cleanups[:n-1]
		defer t.cleanUp() // the earlier ones, even if this one gives up
		f()
	}
}

// check gives up if there is an error.
func (t *test) check(err error) {
	if err != nil {
		if late := t.ctx.Err(); late != nil && !errors.Is(err, late) {
			err = fmt.Errorf("%w (%w)", err, late)
		}
		t.errs = append(t.errs, err)
		runtime.Goexit()
	}
}

// must gives up if there is an error: must(f())(t).
func must[T any](v T, err error) func(*test) T {
	return func(t *test) T { t.check(err); return v }
}

// fatalf fails and gives up, errorf only fails.
func (t *test) fatalf(format string, args ...any) { t.check(fmt.Errorf(format, args...)) }
func (t *test) errorf(format string, args ...any) {
	t.errs = append(t.errs, fmt.Errorf(format, args...))
}

// report tells what was measured.
func (t *test) report(format string, args ...any) { t.measured = fmt.Sprintf(format, args...) }

// await runs f until it does not fail: again and again, 10 s at most each time. When time is up, it fails with f's last failure.
func (t *test) await(what string, f func(*test)) {
	var last error
	for {
		ctx, cancel := context.WithTimeout(t.ctx, 10*time.Second)
		_, err := t.try(ctx, f)
		cancel()
		if err == nil {
			return
		}
		if last == nil || t.ctx.Err() == nil { // else it was cut short
			last = err
		}
		if !pause(t.ctx, 200*time.Millisecond) {
			t.fatalf("waiting for %s: %w", what, last)
		}
	}
}

// together runs f n times at once, and fails with the first few failures.
func (t *test) together(n int, f func(*test)) {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { _, errs[i] = t.try(t.ctx, f) })
	}
	all.Wait()
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) > 0 {
		t.errorf("%d of %d failed: %w", len(errs), n, errors.Join(errs[:min(3, len(errs))]...))
	}
}

// pause waits, and reports whether there is time left.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
