package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// serverName is what the upstream's certificate is for, beside 127.0.0.1: not every contestant can verify an address.
const serverName = "localhost"

// The paths that the upstream answers, once it has read the request's body, and with what.
const (
	smallPath       = "/v1/messages"
	smallAnswerSize = 1 << 10
	largePath       = "/v1/files/large/content"
	largeAnswerSize = 10 << 20
	streamPath      = "/v1/messages/stream"
	eventInterval   = 100 * time.Millisecond // between two events of a stream
)

// clock is when this process began: events carry the time since then, which both of its ends can read.
var clock = time.Now()

// startUpstream starts the API that everything is proxied to, in this process.
func startUpstream(protocol fakeanthropic.Protocol) (*fakeanthropic.Server, error) {
	mux := http.NewServeMux()
	mux.HandleFunc(smallPath, answer(smallAnswerSize))
	mux.HandleFunc(largePath, answer(largeAnswerSize))
	mux.HandleFunc(streamPath, streamEvents)
	up, err := fakeanthropic.Start(protocol, requireBeta(mux))
	if err == nil {
		up.Forget()
	}
	return up, err
}

// address is where up listens.
func address(up *fakeanthropic.Server) string { return strings.TrimPrefix(up.URL, "https://") }

// requireBeta refuses requests that no contestant has added the beta to, or that have lost the client's.
func requireBeta(next http.Handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		betas := strings.Join(r.Header["Anthropic-Beta"], ",")
		if !strings.Contains(betas, beta) || !strings.Contains(betas, clientBeta) {
			http.Error(w, fmt.Sprintf("anthropic-beta is %q, want %s and %s", betas, clientBeta, beta), http.StatusBadRequest)
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err == nil { // otherwise the contestant has left
			next.ServeHTTP(w, r)
		}
	}
}

// answer answers with size bytes and the headers that the API sends.
func answer(size int) http.HandlerFunc {
	body := bytes.Repeat([]byte("x"), size)
	headers := http.Header{
		"Content-Type":                           {"application/json"},
		"Content-Length":                         {strconv.Itoa(size)},
		"Request-Id":                             {"req_011CSHoEeqs5C35K2UUqR7Fy"},
		"Anthropic-Organization-Id":              {"00000000-0000-0000-0000-000000000000"},
		"Anthropic-Ratelimit-Requests-Limit":     {"4000"},
		"Anthropic-Ratelimit-Requests-Remaining": {"3999"},
		"Anthropic-Ratelimit-Requests-Reset":     {"2026-01-01T00:00:00Z"},
		"Cf-Cache-Status":                        {"DYNAMIC"},
	}
	return func(w http.ResponseWriter, r *http.Request) {
		maps.Copy(w.Header(), headers)
		_, _ = w.Write(body) // the client's end notices what is missing
	}
}

// streamEvents sends an event every eventInterval, stamped with the time, until the client leaves.
func streamEvents(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.Header().Set("Cache-Control", "no-cache")
	control := http.NewResponseController(w)
	if control.Flush() != nil {
		return
	}
	phase, _ := time.ParseDuration(r.URL.Query().Get("phase")) // absent: 0
	time.Sleep(phase)
	ticker := time.NewTicker(eventInterval)
	defer ticker.Stop()
	for event := []byte(nil); r.Context().Err() == nil; <-ticker.C {
		event = fmt.Appendf(event[:0], eventFormat, time.Since(clock))
		if _, err := w.Write(event); err != nil || control.Flush() != nil {
			return
		}
	}
}

// eventFormat is that of a server-sent event, about the size of a short text delta of the API, with its stamp in nanoseconds.
const (
	eventPrefix = `data: {"sent":"`
	eventFormat = "event: content_block_delta\n" + eventPrefix + `%019d","delta":{"type":"text_delta","text":"` +
		"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\"}}\n\n"
)

// parseEvent returns the stamp of a line of an event; ok is false for lines that have none.
func parseEvent(line []byte) (sent time.Duration, ok bool) {
	rest, found := bytes.CutPrefix(line, []byte(eventPrefix))
	digits, _, _ := bytes.Cut(rest, []byte(`"`))
	n, err := strconv.ParseInt(string(digits), 10, 64)
	return time.Duration(n), found && err == nil
}
