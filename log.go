package main

import (
	"io"
	"log/slog"
	"strings"
)

// levelTrace is below debug: per-connection noise.
const levelTrace = slog.Level(-8)

// newLogger returns a logger that writes JSON lines to w: timestamp (RFC 3339, milliseconds, UTC),
// level, message, then the fields of the line.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level, ReplaceAttr: contractKeys}))
}

// contractKeys gives slog's own fields the names and forms that users were promised.
func contractKeys(groups []string, a slog.Attr) slog.Attr {
	if len(groups) > 0 {
		return a
	}
	switch a.Key {
	case slog.TimeKey:
		return slog.String("timestamp", a.Value.Time().UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	case slog.MessageKey:
		a.Key = "message"
	case slog.LevelKey:
		if a.Value.Any() == levelTrace {
			a.Value = slog.StringValue("TRACE")
		}
	}
	return a
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
