package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// TestTry holds that a criterion that should fail does, with all its reasons.
func TestTry(t *testing.T) {
	var did []string
	note := func(what string) { did = append(did, what) }
	attempts := 0
	for _, c := range []struct {
		name  string
		prove func(*test)
		did   string   // what was done, in order
		wants []string // the failures
	}{
		{"nothing fails", func(t *test) { t.check(nil) }, "", nil},
		{"errorf goes on, fatalf does not", func(t *test) { t.errorf("one"); note("on"); t.fatalf("two"); note("never") }, "on", []string{"one", "two"}},
		{"cleanups run from the last to the first, whatever fails", func(t *test) {
			t.cleanup(func() { note("first") })
			t.cleanup(func() { note("last"); t.fatalf("two") })
			t.check(errors.New("one"))
		}, "last first", []string{"one", "two"}},
		{"an attempt that works is the last", func(t *test) {
			t.await("it", func(t *test) {
				if attempts++; attempts < 3 {
					t.fatalf("not yet")
				}
				note("done")
			})
		}, "done", nil},
		{"waiting ends with the criterion", func(t *test) {
			t.await("it", func(t *test) { t.fatalf("not yet") })
		}, "", []string{"waiting for it: not yet", context.DeadlineExceeded.Error()}},
		{"each of many may fail", func(t *test) {
			t.together(50, func(t *test) { t.fatalf("one of them") })
			note("on")
		}, "on", []string{"50 of 50 failed", "one of them"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			did = nil
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := new(world).try(ctx, c.prove)
			if got := strings.Join(did, " "); got != c.did {
				t.Errorf("done: %q, want %q", got, c.did)
			}
			if (err != nil) != (c.wants != nil) {
				t.Errorf("error %v, want %q", err, c.wants)
			}
			for _, want := range c.wants {
				if err != nil && !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q", err, want)
				}
			}
		})
	}
}
