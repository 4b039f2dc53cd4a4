package main

import (
	"context"
	"fmt"
	"sync"
	"time"
)

const (
	// beat is the time between two looks at the clock.
	beat = 50 * time.Millisecond
	// stallLength is how late a look has to be to count: timeouts here are of a
	// second or two, and other processes stand still longer than this one at times.
	stallLength = 200 * time.Millisecond
	// stallBefore and stallAfter widen a request's time: a connection that is lost
	// went silent before, and the proxy may notice a client's departure later.
	stallBefore, stallAfter = 3 * time.Second, 3 * time.Second
)

// A pulse finds out when this process got no processor, and so when the others on
// this machine hardly did.
type pulse struct {
	mu     sync.Mutex
	stalls []stall
}

// A stall is a time in which nothing went on.
type stall struct{ from, to time.Time }

// watch looks at the clock until ctx ends.
func (p *pulse) watch(ctx context.Context) {
	for ctx.Err() == nil {
		from := time.Now()
		time.Sleep(beat)
		p.note(from, time.Now())
	}
}

// note counts the time between two looks if it is a stall.
func (p *pulse) note(from, to time.Time) {
	if to.Sub(from) < beat+stallLength {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stalls = append(p.stalls, stall{from, to})
}

// stalled reports whether there was a stall at about that time.
func (p *pulse) stalled(from, to time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.stalls {
		if s.from.Before(to.Add(stallAfter)) && s.to.After(from.Add(-stallBefore)) {
			return true
		}
	}
	return false
}

func (p *pulse) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var longest, all time.Duration
	for _, s := range p.stalls {
		longest = max(longest, s.to.Sub(s.from))
		all += s.to.Sub(s.from)
	}
	return fmt.Sprintf("%d times, %v at most, %v in all", len(p.stalls), longest.Round(time.Millisecond), all.Round(time.Millisecond))
}
