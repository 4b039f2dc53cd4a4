package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

// TestFailureAnswers: the table of the specification, and a body that Anthropic's SDKs can read.
func TestFailureAnswers(t *testing.T) {
	cause := errors.New("cause")
	for _, row := range []struct {
		name      string
		failure   *failure
		status    int
		code      string
		errorType errorType
		message   string // in the body's message
		header    map[string]string
	}{
		{name: "timeout", failure: errTimeout(3, cause), status: 504, code: "timeout", errorType: "timeout", message: "in 3 attempt(s)", header: map[string]string{"X-Should-Retry": "false"}},
		{name: "connection", failure: errConnection(cause), status: 502, code: "connection", errorType: "connection", message: "cause"},
		{name: "too large", failure: errBodyTooLarge(10 << 20), status: 400, code: "invalid_request", errorType: "invalid_request", message: "larger than 10 MiB"},
		{name: "malformed", failure: errMalformedBody, status: 400, code: "invalid_request", errorType: "invalid_request", message: "chunked"},
		{name: "internal", failure: errInternal(cause), status: 500, code: "internal", errorType: "internal", message: "bug"},
		{name: "response read", failure: errResponseRead(cause), status: 502, code: "response_read", errorType: "response_read", message: "broke off"},
		{name: "not connected", failure: errNotConnected, status: 503, code: "not_connected", message: "tailnet", header: map[string]string{"Retry-After": "2"}},
		{name: "unknown caller", failure: errUnknownCaller, status: 403, code: "forbidden", message: "tailnet"},
		{name: "shutting down", failure: errShuttingDown, status: 503, code: "shutting_down", message: "shutting down", header: map[string]string{"X-Should-Retry": "true", "Connection": "close"}},
		{name: "CONNECT", failure: errConnectMethod, status: 405, code: "method_not_allowed", message: "CONNECT", header: map[string]string{"Allow": "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"}},
		{name: "silent upload", failure: errSilentUpload, status: 408, code: "request_timeout", message: "stopped arriving"},
		{name: "slow upload", failure: errSlowUpload, status: 408, code: "request_timeout", message: "8 KiB/s"},
	} {
		t.Run(row.name, func(t *testing.T) {
			if row.failure.errorType != row.errorType {
				t.Errorf("error_type %q, want %q", row.failure.errorType, row.errorType)
			}
			w := httptest.NewRecorder()
			row.failure.writeTo(w, "req_1")
			want := map[string]string{"Content-Type": "application/json", "Content-Length": strconv.Itoa(w.Body.Len())}
			for name, value := range row.header {
				want[name] = value
			}
			got := map[string]string{}
			for name := range w.Header() {
				got[name] = w.Header().Get(name)
			}
			if w.Code != row.status || !reflect.DeepEqual(got, want) {
				t.Errorf("status %d, header %v; want %d, %v", w.Code, got, row.status, want)
			}
			var body any
			if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
				t.Fatal(err)
			}
			inner, _ := body.(map[string]any)["error"].(map[string]any)
			message, _ := inner["message"].(string)
			if !strings.Contains(message, row.message) {
				t.Errorf("the message %q lacks %q", message, row.message)
			}
			shape := map[string]any{"type": "error", "request_id": "req_1",
				"error": map[string]any{"type": "proxy_error", "code": row.code, "message": message, "request_id": "req_1"}}
			if !reflect.DeepEqual(body, shape) {
				t.Errorf("the body is\n%s", w.Body)
			}
		})
	}
}

func TestAsFailure(t *testing.T) {
	if f := asFailure(nil); f != nil {
		t.Errorf("nil became %v", f)
	}
	if f := asFailure(fmt.Errorf("wrapped: %w", errSlowUpload)); f != errSlowUpload {
		t.Errorf("a wrapped failure became %v", f)
	}
	if f := asFailure(io.EOF); f.errorType != typeInternal || !errors.Is(f, io.EOF) {
		t.Errorf("a stray error became %v", f)
	}
}

func TestDeparture(t *testing.T) {
	for _, row := range []struct {
		name  string
		cause error
		want  *failure
	}{
		{name: "client left", cause: nil, want: errClientGone},
		{name: "some other cause", cause: io.EOF, want: errClientGone},
		{name: "process stops", cause: errShuttingDown, want: errShuttingDown},
	} {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(row.cause)
		if got := departure(ctx); got != row.want {
			t.Errorf("%s: %v, want %v", row.name, got, row.want)
		}
	}
}

// TestDescribe: what a peer sent, which net/http quotes, stays out of messages and logs.
func TestDescribe(t *testing.T) {
	for text, want := range map[string]string{
		`plain`: `plain`,
		`net/http: HTTP/1.x transport connection broken: malformed HTTP status code "secret"`: `net/http: HTTP/1.x transport connection broken: malformed HTTP status code`,
		`malformed MIME header: "secret" and "more"`:                                          `malformed MIME header`,
		`"secret"`: ``,
	} {
		if got := describe(errors.New(text)); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
