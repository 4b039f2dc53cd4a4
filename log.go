package main

import (
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

const (
	// levelTrace is below debug. LOG_LEVEL has it, but nothing is logged at it.
	levelTrace = slog.Level(-8)
	// logBuffer bounds the lines that wait for a slow reader of standard output, in bytes; beyond it they are dropped.
	logBuffer = 1 << 20
	// maxLogged bounds each value in a line that a peer chose, in bytes.
	maxLogged = 256
	// timeFormat is RFC 3339 with milliseconds.
	timeFormat = "2006-01-02T15:04:05.000Z07:00"
)

// lineWriter takes whole lines for a writer that may hang, and never waits for it. The zero value is not usable;
// see [newLogger].
type lineWriter struct {
	out     *gatherer
	dropped atomic.Uint64 // since the start
	untold  uint64        // of them, those that no line has told of yet
}

// newLogger returns a logger that writes JSON lines to out: timestamp (RFC 3339, milliseconds, UTC), level, message,
// then the fields of the line. A reader of out that has gone, or hangs, holds nobody up.
func newLogger(out io.Writer, level slog.Level) (*slog.Logger, *lineWriter) {
	w := &lineWriter{out: newGatherer(logBuffer/2, func(lines []byte) error {
		out.Write(lines) // to whom could a failure be told?
		return nil
	})}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: nameAttr})), w
}

// nameAttr gives a line's first three fields the names and forms that users were promised.
func nameAttr(_ []string, a slog.Attr) slog.Attr {
	switch value := a.Value; {
	case a.Key == slog.TimeKey && value.Kind() == slog.KindTime:
		return slog.String("timestamp", value.Time().UTC().Format(timeFormat))
	case a.Key == slog.MessageKey:
		a.Key = "message"
	case a.Key == slog.LevelKey && value.Any() == levelTrace:
		a.Value = slog.StringValue("TRACE")
	}
	return a
}

// Write implements io.Writer for a slog.Handler, which calls it once a line, for one line at a time.
func (w *lineWriter) Write(line []byte) (int, error) {
	lines := line
	if w.untold > 0 {
		lines = append(fmt.Appendf(nil, `{"timestamp":%q,"level":"WARN","message":"log lines dropped, as nobody read them in time","lines":%d}`+"\n",
			time.Now().UTC().Format(timeFormat), w.untold), line...)
	}
	if w.out.tryAdd(lines) {
		w.untold = 0
	} else {
		w.untold++
		w.dropped.Add(1)
	}
	return len(line), nil
}

// flush waits until all lines are written, for d at most.
func (w *lineWriter) flush(d time.Duration) { w.out.flush(d) }

// throttledWarnings logs the lines that are written to it, one a second at most, each with how many were left out before it.
type throttledWarnings struct {
	log *slog.Logger

	mu      sync.Mutex
	latest  time.Time
	leftOut int
}

// Write implements io.Writer for a log.Logger, which calls it once a line.
func (c *throttledWarnings) Write(line []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(c.latest) < time.Second {
		c.leftOut++
	} else {
		c.log.Warn(shorten(strings.TrimSpace(string(line))), "left_out", c.leftOut)
		c.latest, c.leftOut = time.Now(), 0
	}
	return len(line), nil
}

// shorten cuts what a peer chose to maxLogged bytes, visibly.
func shorten(s string) string {
	if len(s) <= maxLogged {
		return s
	}
	end := maxLogged - len("…")
	for !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}

// parseLevel reads LOG_LEVEL. ok is false for a word that it does not know, which means info.
func parseLevel(s string) (level slog.Level, ok bool) {
	switch strings.ToLower(s) {
	case "error":
		return slog.LevelError, true
	case "warn":
		return slog.LevelWarn, true
	case "info", "":
		return slog.LevelInfo, true
	case "debug":
		return slog.LevelDebug, true
	case "trace":
		return levelTrace, true
	}
	return slog.LevelInfo, false
}
