package soak

import (
	"context"
	"slices"
	"time"
)

const (
	// beat is the time between two looks at the clock.
	beat = 50 * time.Millisecond
	// stallLength is how late a look has to be to count: timeouts here are of a second or two, and other processes stand still longer
	// than this one at times.
	stallLength = 200 * time.Millisecond
	// stallMargin widens a request's time: a connection that is lost went silent before, and the proxy may notice a client's departure
	// later.
	stallMargin = 3 * time.Second
)

// stalls are the times when this process got no processor, and so the others on this machine hardly did.
type stalls []struct{ from, to time.Time }

// watch looks at the clock until ctx ends.
func (s *stalls) watch(ctx context.Context) {
	for ctx.Err() == nil {
		from := time.Now()
		time.Sleep(beat)
		if to := time.Now(); to.Sub(from) >= beat+stallLength {
			*s = append(*s, struct{ from, to time.Time }{from, to})
		}
	}
}

// at reports whether there was a stall at about that time.
func (s stalls) at(from, to time.Time) bool {
	from, to = from.Add(-stallMargin), to.Add(stallMargin)
	return slices.ContainsFunc(s, func(stall struct{ from, to time.Time }) bool { return stall.from.Before(to) && stall.to.After(from) })
}
