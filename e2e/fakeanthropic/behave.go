package fakeanthropic

import (
	"bytes"
	"io"
	"math"
	"net/http"
	"time"
)

// Silent reads the request and never answers. It returns when the client leaves.
func Silent() http.Handler { return Slow(math.MaxInt64, nil) }

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
