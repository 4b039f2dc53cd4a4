package proxytest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"
)

// A Line is one line of the proxy's log.
type Line struct {
	Raw    string         // as it was written, without the newline
	Fields map[string]any // nil if the line is not a JSON object
	At     time.Time      // when it was read here
}

// Message returns the line's "message", or "" if it has none.
func (l Line) Message() string { return l.Text("message") }

// Text returns the string under key, or "" if there is none.
func (l Line) Text(key string) string {
	s, _ := l.Fields[key].(string)
	return s
}

// Number returns the number under key, or 0 if there is none.
func (l Line) Number(key string) float64 {
	n, _ := l.Fields[key].(float64)
	return n
}

// logs collects lines as a process writes them, and wakes those who wait.
type logs struct {
	mu      sync.Mutex
	lines   []Line
	partial []byte        // after the last newline
	changed chan struct{} // closed and replaced when lines grows
}

func newLogs() *logs { return &logs{changed: make(chan struct{})} }

// Write takes output in whatever pieces it arrives. It never fails.
func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.partial = append(l.partial, p...)
	for {
		raw, rest, found := bytes.Cut(l.partial, []byte("\n"))
		if !found {
			return len(p), nil
		}
		l.append(string(raw))
		l.partial = bytes.Clone(rest)
	}
}

func (l *logs) append(raw string) {
	line := Line{Raw: raw, At: time.Now()}
	if json.Unmarshal([]byte(raw), &line.Fields) != nil {
		line.Fields = nil
	}
	l.lines = append(l.lines, line)
	close(l.changed)
	l.changed = make(chan struct{})
}

// since returns the lines from number from on, and a channel that is closed when there are more.
func (l *logs) since(from int) ([]Line, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines[min(from, len(l.lines)):len(l.lines):len(l.lines)], l.changed
}

// wait returns the first line that matches, however old, or ctx's error.
func (l *logs) wait(ctx context.Context, match func(Line) bool) (Line, error) {
	for seen := 0; ; {
		lines, changed := l.since(seen)
		for _, line := range lines {
			if match(line) {
				return line, nil
			}
		}
		seen += len(lines)
		select {
		case <-changed:
		case <-ctx.Done():
			return Line{}, fmt.Errorf("%w; the log is:\n%s", context.Cause(ctx), l)
		}
	}
}

// String returns everything that was written.
func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	for _, line := range l.lines {
		b.WriteString(line.Raw)
		b.WriteByte('\n')
	}
	b.Write(l.partial)
	return b.String()
}
