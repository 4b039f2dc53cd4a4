package main

import (
	"context"
	"encoding/hex"
	"io"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode/utf8"
)

// levelTrace is below debug: per-connection noise.
const levelTrace = slog.Level(-8)

// newLogger returns a logger that writes JSON lines to w: timestamp (RFC 3339, milliseconds, UTC),
// level, message, then the fields of the line.
func newLogger(w io.Writer, level slog.Level) *slog.Logger {
	return slog.New(&lineHandler{level: level, out: &lineWriter{w: w}})
}

// lineHandler is a slog.Handler. A request's line costs it a third of what slog's own JSON handler
// takes, with a ReplaceAttr for the names that users were promised, and no allocation.
type lineHandler struct {
	level slog.Level
	out   *lineWriter
	group string // goes before the keys, each group with a dot behind it
	attrs []byte // given to WithAttrs, as they go into the line
}

// lineWriter writes whole lines.
type lineWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// Enabled implements slog.Handler.
func (h *lineHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

// WithAttrs implements slog.Handler.
func (h *lineHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	with.attrs = slices.Clone(h.attrs)
	for _, a := range attrs {
		with.attrs = appendAttr(with.attrs, h.group, a)
	}
	return &with
}

// WithGroup implements slog.Handler.
func (h *lineHandler) WithGroup(name string) slog.Handler {
	with := *h
	with.group += name + "."
	return &with
}

// Handle implements slog.Handler.
func (h *lineHandler) Handle(_ context.Context, r slog.Record) error {
	level := r.Level.String()
	if r.Level == levelTrace {
		level = "TRACE"
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	b := append(h.out.buf[:0], `{"timestamp":"`...)
	b = r.Time.UTC().AppendFormat(b, "2006-01-02T15:04:05.000Z07:00")
	b = append(b, `","level":"`...)
	b = append(b, level...)
	b = append(b, `","message":`...)
	b = appendJSONString(b, r.Message)
	b = append(b, h.attrs...)
	r.Attrs(func(a slog.Attr) bool {
		b = appendAttr(b, h.group, a)
		return true
	})
	b = append(b, "}\n"...)
	h.out.buf = b
	_, err := h.out.w.Write(b)
	return err
}

// fieldAppender is a value that is many fields of a line. It writes them itself: a [slog.Record] allocates for
// more than five.
type fieldAppender interface {
	// appendFields appends them to a JSON object that has a member already.
	appendFields(b []byte) []byte
}

// appendAttr appends a to a JSON object that has a member already.
func appendAttr(b []byte, group string, a slog.Attr) []byte {
	key := group + a.Key
	switch v := a.Value.Resolve(); v.Kind() {
	case slog.KindInt64:
		return appendInt(b, key, v.Int64())
	case slog.KindUint64:
		return strconv.AppendUint(appendKey(b, key), v.Uint64(), 10)
	case slog.KindBool:
		return strconv.AppendBool(appendKey(b, key), v.Bool())
	case slog.KindAny:
		if fields, ok := v.Any().(fieldAppender); ok {
			return fields.appendFields(b)
		}
		return appendString(b, key, v.String())
	default:
		return appendString(b, key, v.String())
	}
}

// appendString appends a member of a JSON object, as appendAttr does.
func appendString(b []byte, key, value string) []byte {
	return appendJSONString(appendKey(b, key), value)
}

// appendInt appends a member of a JSON object, as appendAttr does.
func appendInt(b []byte, key string, value int64) []byte {
	return strconv.AppendInt(appendKey(b, key), value, 10)
}

// appendKey appends a member's name, and what goes around it.
func appendKey(b []byte, key string) []byte {
	b = append(b, ',')
	b = appendJSONString(b, key)
	return append(b, ':')
}

// appendJSONString appends s as a JSON string. What is not UTF-8 becomes U+FFFD.
func appendJSONString(b []byte, s string) []byte {
	b = append(b, '"')
	for i, c := range s {
		switch {
		case c == '"', c == '\\':
			b = append(b, '\\', byte(c))
		case c < ' ', c == 0x7f:
			b = append(b, `\u00`...)
			b = hex.AppendEncode(b, []byte{byte(c)})
		case c < utf8.RuneSelf:
			b = append(b, s[i])
		default:
			b = utf8.AppendRune(b, c)
		}
	}
	return append(b, '"')
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
