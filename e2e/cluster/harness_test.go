package main

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

// TestTry holds that a criterion that should fail does, with all its reasons, and is cleaned up after.
func TestTry(t *testing.T) {
	var did []string
	note := func(what string) { did = append(did, what) }
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err := new(world).try(ctx, func(t *test) {
		t.cleanup(func() { note("first") })
		t.cleanup(func() { note("last"); t.fatalf("cleanup") })
		t.check(nil)
		attempts := 0
		t.await("it", func(t *test) {
			if attempts++; attempts < 3 {
				t.fatalf("not counted")
			}
			note("attempted")
		})
		t.together(50, func(t *test) { t.fatalf("one of them") })
		note("on")
		t.await("what never comes", func(t *test) { t.fatalf("not yet") })
		note("never")
	})
	if got := strings.Join(did, " "); got != "attempted on last first" {
		t.Errorf("done: %q", got)
	}
	for _, want := range []string{
		"50 of 50 failed", "one of them", "waiting for what never comes: not yet", context.DeadlineExceeded.Error(), "cleanup",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
	if errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "not counted") {
		t.Errorf("error %v", err)
	}
}
