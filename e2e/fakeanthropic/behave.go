package fakeanthropic

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"time"
)

// errorTypes are the real API's names of its error statuses.
var errorTypes = map[int]string{
	http.StatusBadRequest:          "invalid_request_error",
	http.StatusUnauthorized:        "authentication_error",
	http.StatusForbidden:           "permission_error",
	http.StatusNotFound:            "not_found_error",
	http.StatusTooManyRequests:     "rate_limit_error",
	http.StatusInternalServerError: "api_error",
	529:                            "overloaded_error",
}

// Fail answers every request with an error of the real API: 400, 401, 403, 404,
// 429, 500 or 529. 429 and 529 carry retry-after, and 429 an exhausted rate limit.
func Fail(status int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		setHeaders(w.Header())
		switch status {
		case http.StatusTooManyRequests:
			w.Header().Set("Retry-After", "17")
			w.Header().Set("Anthropic-Ratelimit-Requests-Remaining", "0")
		case 529:
			w.Header().Set("Retry-After", "3")
		}
		writeError(w, status, errorTypes[status], "fake "+errorTypes[status])
	})
}

func writeError(w http.ResponseWriter, status int, kind, text string) {
	writeJSON(w, status, object{
		"type":       "error",
		"error":      object{"type": kind, "message": text},
		"request_id": w.Header().Get("Request-Id"),
	})
}

// Silent reads the request and never answers. It returns when the client leaves.
func Silent() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // otherwise net/http would send a 200
	})
}

// Slow reads the request and sends no headers for that long; then next answers.
func Slow(delay time.Duration, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// An HTTP/1.1 server notices a client that leaves only after the body.
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		select {
		case <-time.After(delay):
			next.ServeHTTP(w, r)
		case <-r.Context().Done():
			panic(http.ErrAbortHandler)
		}
	})
}

// Gzip compresses what next writes, whatever the client accepts.
func Gzip(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Set("Vary", "Accept-Encoding")
		z := gzip.NewWriter(w)
		defer z.Close()
		next.ServeHTTP(&gzipWriter{w, z}, r)
	})
}

// gzipWriter writes a body through z.
type gzipWriter struct {
	http.ResponseWriter
	z *gzip.Writer
}

func (w *gzipWriter) Write(p []byte) (int, error) { return w.z.Write(p) }

// FlushError is what http.ResponseController calls.
func (w *gzipWriter) FlushError() error {
	if err := w.z.Flush(); err != nil {
		return err
	}
	return http.NewResponseController(w.ResponseWriter).Flush()
}
