package main

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// No request has a limit on its whole time: what is bounded here is how long nothing happens, towards the client and
// towards the upstream.

const (
	// maxLateness is how late a timer may ring. One that is later shows that the process, or its machine, was suspended.
	maxLateness = 100 * time.Millisecond
	// catchUp is what a wait then gets, once, to read what has come meanwhile: nobody was silent.
	catchUp = time.Second
)

// watch bounds one wait: for a body, for response headers, for more of an answer.
type watch struct {
	// overdue is called when the time has passed, and must not call stop. It returns how much longer to wait; 0 or less
	// says that it has ended the wait.
	overdue func(now time.Time) time.Duration

	mu    sync.Mutex
	timer *time.Timer
	due   time.Time
	late  bool // the process was suspended when the wait became due, and has time to catch up
	ended bool // by overdue
	done  bool
}

// startWatch has overdue called after d, unless stop is called before.
func startWatch(d time.Duration, overdue func(now time.Time) time.Duration) *watch {
	w := &watch{overdue: overdue, due: time.Now().Add(d)}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(d, w.ring)
	return w
}

// ring is the timer's function.
func (w *watch) ring() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return
	}
	now, more := time.Now(), catchUp
	if w.late = !w.late && now.Sub(w.due) > maxLateness; !w.late {
		more = w.overdue(now)
	}
	if more <= 0 {
		w.ended, w.done = true, true
		return
	}
	w.due = now.Add(more)
	w.timer.Reset(more)
}

// stop ends the wait. inTime is false if overdue has ended it before.
func (w *watch) stop() (inTime bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	w.timer.Stop()
	return !w.ended
}

// silence bounds each single read from a stream. The time between two reads does not count.
type silence struct {
	*watch
	from  io.Reader
	limit time.Duration
	start time.Time
	since atomic.Int64 // when the present read began, in ns since start; or betweenReads
}

const betweenReads = -1

// boundSilence returns a reader of from that calls cut when a read takes longer than limit; that must end the read. It is
// to be stopped.
func boundSilence(from io.Reader, limit time.Duration, cut func()) *silence {
	s := &silence{from: from, limit: limit, start: time.Now()}
	s.since.Store(betweenReads)
	s.watch = startWatch(limit, func(now time.Time) time.Duration {
		left := limit
		if since := s.since.Load(); since != betweenReads {
			left -= now.Sub(s.start) - time.Duration(since)
		}
		if left <= 0 {
			cut()
		}
		return left
	})
	return s
}

// Read implements io.Reader.
func (s *silence) Read(p []byte) (int, error) {
	s.since.Store(int64(time.Since(s.start)))
	n, err := s.from.Read(p)
	s.since.Store(betweenReads)
	return n, err
}

// rollingDeadline keeps the write deadline of a connection ahead of the newest write. It is moved only
// when an eighth of the time has passed, since moving it costs more than writing an event.
type rollingDeadline struct {
	conn    net.Conn
	timeout time.Duration
	at      time.Time
}

// extend gives the write that comes next at least the timeout.
func (d *rollingDeadline) extend() {
	if now := time.Now(); d.at.Sub(now) < d.timeout {
		d.at = now.Add(d.timeout + d.timeout/8)
		d.conn.SetWriteDeadline(d.at)
	}
}
