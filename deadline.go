package main

import (
	"context"
	"io"
	"sync/atomic"
	"time"
)

// No request has a limit on its whole time: what is bounded here is how long nothing happens, towards the client and
// towards the upstream.

// rollingDeadline keeps a deadline at least timeout ahead of the newest use. It is moved only when
// an eighth of that has passed, since moving it costs more than reading a chunk.
type rollingDeadline struct {
	set     func(time.Time) error
	timeout time.Duration
	moved   time.Time
}

// extend moves the deadline ahead of the read or write that comes next.
func (d *rollingDeadline) extend() {
	if now := time.Now(); now.Sub(d.moved) > d.timeout/8 {
		d.set(now.Add(d.timeout + d.timeout/8))
		d.moved = now
	}
}

// silenceWatch cancels an answer when a single read of its body takes longer than limit. The time
// that the client takes to read does not count.
type silenceWatch struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
	start  time.Time
	since  atomic.Int64 // when the present read began, after start; betweenReads if there is none
	silent atomic.Bool
	timer  *time.Timer
}

const betweenReads = -1

// watchSilence starts watching an answer that cancel cancels.
func watchSilence(limit time.Duration, cancel context.CancelCauseFunc) *silenceWatch {
	s := &silenceWatch{limit: limit, cancel: cancel, start: time.Now()}
	s.since.Store(betweenReads)
	s.timer = time.AfterFunc(maxPatience, s.check)
	s.timer.Reset(limit)
	return s
}

// read reads from body into buf.
func (s *silenceWatch) read(body io.Reader, buf []byte) (int, error) {
	s.since.Store(int64(time.Since(s.start)))
	n, err := body.Read(buf)
	s.since.Store(betweenReads)
	return n, err
}

// check runs when a read that began when the timer was set would have taken too long.
func (s *silenceWatch) check() {
	left := s.limit
	if since := s.since.Load(); since != betweenReads {
		left -= time.Since(s.start) - time.Duration(since)
	}
	if left > 0 {
		s.timer.Reset(left)
		return
	}
	s.silent.Store(true)
	s.cancel(errSilence)
}

// broken reports whether the answer was cancelled.
func (s *silenceWatch) broken() bool { return s.silent.Load() }

// stop ends the watch.
func (s *silenceWatch) stop() { s.timer.Stop() }
