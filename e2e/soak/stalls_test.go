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

// A span is from one time to another.
type span struct{ from, to time.Time }

// stalls returns the spans when this process got no processor, and so the others on this machine hardly did, until ctx ends.
func stalls(ctx context.Context) (all []span) {
	for ctx.Err() == nil {
		s := span{from: time.Now()}
		time.Sleep(beat)
		if s.to = time.Now(); s.to.Sub(s.from) >= beat+stallLength {
			all = append(all, s)
		}
	}
	return all
}

// near reports whether one of these was at about that time.
func (s span) near(stalls []span) bool {
	return slices.ContainsFunc(stalls, func(stall span) bool {
		return stall.from.Before(s.to.Add(stallMargin)) && stall.to.After(s.from.Add(-stallMargin))
	})
}
