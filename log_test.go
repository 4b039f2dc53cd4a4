package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// TestLogFormat: the keys, their order and the names of the levels; the time is UTC whatever the zone, with three decimals.
func TestLogFormat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log, lines := newLogger(&out, levelTrace)
		log.Error("x", "error", errors.New("e"))
		log.Warn("—")
		log.Info("hello", "n", 1, "s", `"`, "time", "a field with the name of a first one")
		log.Debug("x")
		log.Log(t.Context(), levelTrace, "x")
		for _, at := range []time.Time{
			time.Date(2026, 1, 2, 3, 4, 5, 999_999_999, time.UTC),
			time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("east", 3600)),
			time.Date(2026, 1, 1, 0, 0, 0, 100_000_000, time.FixedZone("west", -9*3600)),
		} {
			log.Handler().Handle(t.Context(), slog.NewRecord(at, slog.LevelInfo, "at", 0))
		}
		lines.flush(time.Minute)
		equal(t, "the lines", "\n"+out.String(), `
{"timestamp":"2000-01-01T00:00:00.000Z","level":"ERROR","message":"x","error":"e"}
{"timestamp":"2000-01-01T00:00:00.000Z","level":"WARN","message":"—"}
{"timestamp":"2000-01-01T00:00:00.000Z","level":"INFO","message":"hello","n":1,"s":"\"","time":"a field with the name of a first one"}
{"timestamp":"2000-01-01T00:00:00.000Z","level":"DEBUG","message":"x"}
{"timestamp":"2000-01-01T00:00:00.000Z","level":"TRACE","message":"x"}
{"timestamp":"2026-01-02T03:04:05.999Z","level":"INFO","message":"at"}
{"timestamp":"2026-01-02T02:04:05.000Z","level":"INFO","message":"at"}
{"timestamp":"2026-01-01T09:00:00.100Z","level":"INFO","message":"at"}
`)
	})
}

// FuzzLogLine: whatever a line says, it is one line of JSON that says just that.
func FuzzLogLine(f *testing.F) {
	for _, s := range []string{"", "plain", "\"quoted\" \\ /", "\x00\n\r\t\x1f\x7f", "é — 世界 😀", "\u2028\u2029", "\xff\xc3(", "<&>"} {
		f.Add(s, s, s)
	}
	f.Fuzz(func(t *testing.T, message, key, value string) {
		var out bytes.Buffer
		log, lines := newLogger(&out, levelTrace)
		log.With("with", value).Info(message, "."+key, value, "count", 7, "yes", true)
		lines.flush(time.Minute)
		line, rest, _ := strings.Cut(out.String(), "\n")
		holds(t, rest == "" && utf8.ValidString(line), "not one line of UTF-8: %q", out.String())
		var got map[string]any
		equal(t, "reading it", json.Unmarshal([]byte(line), &got), nil)
		for key, want := range map[string]any{"message": valid(message), "with": valid(value), "." + valid(key): valid(value), "count": 7.0, "yes": true} {
			equal(t, key, got[key], want)
		}
	})
}

// TestParseLevel: the words in any case; what is unknown is info, and said to be unknown.
func TestParseLevel(t *testing.T) {
	for word, want := range map[string]string{"error": "ERROR true", "warn": "WARN true", "info": "INFO true", "debug": "DEBUG true", "trace": "DEBUG-4 true", "ERROR": "ERROR true", "Trace": "DEBUG-4 true",
		"": "INFO true", "warning": "INFO false", "off": "INFO false", " info": "INFO false", "-8": "INFO false"} {
		level, known := parseLevel(word)
		equal(t, word, fmt.Sprint(level, " ", known), want)
	}
}

// TestLogReaderHangs: nobody waits for a reader of the log that stands still; at most 1 MiB is kept for it, and when it goes on it is told
// how much is missing.
func TestLogReaderHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reader, writer := io.Pipe()
		log, lines := newLogger(writer, slog.LevelInfo)
		const written = 3000
		for i := range written {
			log.Info("x", "i", i, "padding", strings.Repeat("x", 1000))
			if i == 0 {
				synctest.Wait() // that one is under way
			}
		}
		start := time.Now()
		lines.flush(time.Second)
		equal(t, "the end waits for it", time.Since(start), time.Second)
		dropped := int(lines.dropped.Load())
		var out bytes.Buffer
		go io.Copy(&out, reader)
		defer writer.Close()
		synctest.Wait()
		kept := out.Len()
		holds(t, kept <= logBuffer && kept >= logBuffer/3, "%d bytes were kept", kept)
		log.Info("afterwards")
		synctest.Wait()
		got := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
		told := got[len(got)-2]
		equal(t, "lines that came", len(got), written-dropped+2)
		holds(t, dropped > 0 && strings.Contains(told, fmt.Sprintf(`"lines":%d}`, dropped)) && json.Valid([]byte(told)), "%d are dropped, the line says %s", dropped, told)
	})
}

// TestComplaints: of what net/http complains of, one line a second goes into the log, with the number of the others.
func TestComplaints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log logRecorder
		c := &throttledWarnings{log: log.syncLogger()}
		for range 100 {
			c.Write([]byte("http: " + strings.Repeat("x", 1000) + "\n"))
			time.Sleep(100 * time.Millisecond)
		}
		lines := log.lines(t)
		equal(t, "lines", len(lines), 10)
		lines[0].expect(t, "left_out", 0.0)
		lines[1].expect(t, "left_out", 9.0, "message", shorten("http: "+strings.Repeat("x", 1000)))
	})
}

// TestShorten: at most 256 bytes, whole characters, and a cut can be seen.
func TestShorten(t *testing.T) {
	for in, want := range map[string]string{
		"":                       "",
		strings.Repeat("x", 256): strings.Repeat("x", 256),
		strings.Repeat("x", 257): strings.Repeat("x", 253) + "…",
		strings.Repeat("é", 129): strings.Repeat("é", 126) + "…",
	} {
		equal(t, fmt.Sprint(len(in), " bytes"), shorten(in), want)
	}
}
