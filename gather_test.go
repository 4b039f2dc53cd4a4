package main

import (
	"bytes"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// TestGatherer: while one write is under way, what others add waits, in order and up to the limit, and goes out with the
// next; then nothing is held.
func TestGatherer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out [][]byte
		g := newGatherer(10, func(p []byte) error {
			time.Sleep(time.Second)
			out = append(out, bytes.Clone(p))
			return nil
		})
		start := time.Now()
		for i, row := range []struct {
			text  string
			after time.Duration // since the start, when add returns
		}{{"first", 0}, {"four", 0}, {"two", 0}, {"six", 0}, {"-", time.Second}, {"more than the limit", 2 * time.Second}} {
			piece := []byte(row.text)
			equal(t, row.text, g.add(piece), nil)
			equal(t, row.text+": taken after", time.Since(start), row.after)
			clear(piece) // as tls.Conn, which uses its buffer again
			synctest.Wait()
			holds(t, i != 3 || !g.tryAdd([]byte("x")), "more than the limit is kept waiting")
		}
		busy, _ := g.state()
		holds(t, busy && !g.flush(time.Millisecond) && g.flush(time.Minute), "settle does not wait for what is under way")
		equal(t, "written", string(bytes.Join(out, []byte("|"))), "first|fourtwosix|-|more than the limit")
		busy, _ = g.state()
		holds(t, !busy && g.waiting == nil, "something is still held")
	})
}

// TestGathererFails: nothing goes out after an error, which everybody gets, also who waits for room.
func TestGathererFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failed, calls := errors.New("failed"), 0
		g := newGatherer(1, func([]byte) error {
			time.Sleep(time.Second)
			calls++
			return failed
		})
		for i, want := range []error{nil, nil, failed, failed} {
			equal(t, fmt.Sprint("piece ", i), g.add([]byte("x")), want)
			synctest.Wait()
		}
		busy, err := g.state()
		holds(t, !busy && err == failed && calls == 1, "busy %t, error %v, %d writes", busy, err, calls)
	})
}
