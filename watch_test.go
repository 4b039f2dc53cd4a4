package main

import (
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatch: overdue is asked when the time has passed, and not after stop; one that is late may be the fault of a stopped process,
// and is asked a second later.
func TestWatch(t *testing.T) {
	type row struct {
		more    []time.Duration // what overdue answers
		stopped time.Duration   // when stop is called
		want    []time.Duration // when overdue is called
		inTime  bool
	}
	inBubbles(t, map[string]row{
		"in time":                 {stopped: 999 * time.Millisecond, inTime: true},
		"too late":                {more: []time.Duration{0}, stopped: time.Hour, want: []time.Duration{time.Second}},
		"more time":               {more: []time.Duration{time.Minute, 0}, stopped: time.Hour, want: []time.Duration{time.Second, 61 * time.Second}},
		"more time, then in time": {more: []time.Duration{time.Minute}, stopped: 60 * time.Second, want: []time.Duration{time.Second}, inTime: true},
	}, func(t *testing.T, row row) {
		start := time.Now()
		var called []time.Duration
		w := startWatch(time.Second, func(now time.Time) time.Duration {
			called = append(called, now.Sub(start))
			return row.more[len(called)-1]
		})
		time.Sleep(row.stopped)
		equal(t, "in time", w.stop(), row.inTime)
		time.Sleep(time.Hour)
		equal(t, "asked after", called, row.want)
	})
}

// TestWatchOfStoppedProcess: a timer that fires late tells that the process was stopped; what has come meanwhile gets a second.
func TestWatchOfStoppedProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		w := startWatch(time.Hour, func(time.Time) time.Duration { calls.Add(1); return 0 })
		w.due = time.Now().Add(-maxLateness - 1)
		w.ring() // as if it came late
		time.Sleep(catchUp - 1)
		early := calls.Load()
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		equal(t, "in time", w.stop(), false)
		equal(t, "asked before a second has passed, and in all", []int32{early, calls.Load()}, []int32{0, 1})
	})
}

// deadlineRecorder is a connection that counts how often its write deadline is moved.
type deadlineRecorder struct {
	net.Conn
	deadline time.Time
	moves    int
}

func (r *deadlineRecorder) SetWriteDeadline(at time.Time) error {
	r.deadline = at
	r.moves++
	return nil
}

// TestRollingDeadline: at least timeout ahead, moved rarely.
func TestRollingDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var conn deadlineRecorder
		d := rollingDeadline{conn: &conn, timeout: 8 * time.Second}
		for range 1000 {
			d.extend()
			if ahead := time.Until(conn.deadline); ahead < d.timeout || ahead > 9*time.Second {
				t.Fatalf("the deadline is %v ahead, want 8s to 9s", ahead)
			}
			time.Sleep(10 * time.Millisecond)
		}
		holds(t, conn.moves <= 11, "it was moved %d times in 10 s, want once a second", conn.moves)
	})
}
