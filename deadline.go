package main

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// No request has a limit on its whole time: what is bounded here is how long nothing happens, towards the client and
// towards the upstream.

// alarm is a connection's only timer, which its requests use one after the other. The step that a request is at sets it, and
// clears it before the next one begins.
type alarm struct {
	mu    sync.Mutex
	timer *time.Timer
	rings time.Time // when the timer fires; zero if it doesn't
	due   time.Time // when the step is overdue: never before the timer fires
	step  step      // nil while there is nothing to wait for
	late  bool      // the process was stopped when the step became due, and has time to catch up
}

// A timer that is not punctual tells that the process was stopped, alone or with its machine. What has come meanwhile is
// still to be read, and the silence of a process that can't listen is nobody's fault: so a step gets some time to catch up.
const (
	punctual = 100 * time.Millisecond
	catchUp  = time.Second
)

// step is what a request waits for: its body, response headers, more of the answer.
type step interface {
	// overdue is called when the time that was set has passed. It returns how much longer to wait; 0 says
	// that it has ended the step.
	overdue(now time.Time) time.Duration
}

// set has s told once it has lasted for d.
func (a *alarm) set(s step, d time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.step, a.due, a.late = s, time.Now().Add(d), false
	if a.rings.IsZero() || a.due.Before(a.rings) { // else it moves itself when it fires
		a.arm(d)
	}
}

// arm has the timer fire when the step is due, after d. The caller holds a.mu.
func (a *alarm) arm(d time.Duration) {
	a.rings = a.due
	if a.timer == nil {
		a.timer = time.AfterFunc(d, a.ring)
	} else {
		a.timer.Reset(d)
	}
}

// ring is the timer's function. It may come in the time of a later step than the one that set it.
func (a *alarm) ring() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rings = time.Time{}
	if a.step == nil {
		return
	}
	now := time.Now()
	left := a.due.Sub(now)
	switch {
	case left > 0:
	case left < -punctual && !a.late:
		a.late, left = true, catchUp
	default:
		if left = a.step.overdue(now); left == 0 {
			a.step = nil
			return
		}
		a.late = false
	}
	a.due = now.Add(left)
	a.arm(left)
}

// clear ends the wait. inTime is false if overdue has ended it before.
func (a *alarm) clear() (inTime bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	inTime = a.step != nil
	a.step = nil
	return inTime
}

// stop gives the timer back; it can be set again.
func (a *alarm) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.step, a.rings = nil, time.Time{}
	if a.timer != nil {
		a.timer.Stop()
	}
}

// headerWait is the step of waiting for response headers.
type headerWait struct{ cancel context.CancelCauseFunc }

func (h *headerWait) overdue(time.Time) time.Duration {
	h.cancel(errHeaderTimeout)
	return 0
}

// silence is the step of passing an answer on: it cancels the answer when a single read of its body takes
// longer than limit. The time that the client takes to read does not count.
type silence struct {
	limit  time.Duration
	cancel context.CancelCauseFunc
	start  time.Time
	since  atomic.Int64 // when the present read began, after start; betweenReads if there is none
}

const betweenReads = -1

// read reads from body into buf.
func (s *silence) read(body io.Reader, buf []byte) (int, error) {
	s.since.Store(int64(time.Since(s.start)))
	n, err := body.Read(buf)
	s.since.Store(betweenReads)
	return n, err
}

func (s *silence) overdue(now time.Time) time.Duration {
	left := s.limit
	if since := s.since.Load(); since != betweenReads {
		left -= now.Sub(s.start) - time.Duration(since)
	}
	if left > 0 {
		return left
	}
	s.cancel(errSilence)
	return 0
}

// rollingDeadline keeps the write deadline of a connection ahead of the newest write. It is moved only
// when an eighth of the time has passed, since moving it costs more than writing an event.
type rollingDeadline struct{ at time.Time }

// begin forgets the deadline of the answer before, which net/http has taken away.
func (d *rollingDeadline) begin() { d.at = time.Time{} }

// extend gives the write that comes next at least timeout.
func (d *rollingDeadline) extend(conn net.Conn, timeout time.Duration) {
	if now := time.Now(); d.at.Sub(now) < timeout {
		d.at = now.Add(timeout + timeout/8)
		conn.SetWriteDeadline(d.at)
	}
}
