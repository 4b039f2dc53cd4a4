package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

// checkErrorBody holds what a client gets of a failure against the specification: valid HTTP, and a body that Anthropic's SDKs
// can read. It returns the header.
func checkErrorBody(t *testing.T, f *failure, id string) http.Header {
	t.Helper()
	w := httptest.NewRecorder()
	f.writeTo(w, id)
	var wire bytes.Buffer
	equal(t, "writing it", w.Result().Write(&wire), nil)
	a := must(http.ReadResponse(bufio.NewReader(&wire), nil))
	body := must(io.ReadAll(a.Body))
	equal(t, "the status", a.StatusCode, f.status)
	equal(t, "the length", a.ContentLength, int64(len(body)))
	equal(t, "the type", a.Header.Get("Content-Type"), "application/json")
	line, rest, ok := strings.Cut(string(body), "\n")
	holds(t, ok && rest == "" && utf8.ValidString(line), "not one line of text: %q", body)
	want := map[string]any{"type": "error", "request_id": valid(id), "error": map[string]any{
		"type": "proxy_error", "code": valid(f.code), "message": valid(f.message), "request_id": valid(id)}}
	var got map[string]any
	equal(t, "reading the body", json.Unmarshal(body, &got), nil)
	equal(t, "the body", got, want)
	return w.Header()
}

// TestFailureAnswers: the table of the specification.
func TestFailureAnswers(t *testing.T) {
	cause := errors.New("cause")
	for _, row := range []struct {
		failure *failure
		want    string // status, code and type
		message string // in the body's message
		header  string // besides those of the body
	}{
		{failure: errTimeout(3, cause), want: "504 timeout timeout", message: "in 3 attempt(s)", header: "X-Should-Retry: false"},
		{failure: errConnection(cause), want: "502 connection connection", message: "cause"},
		{failure: errBodyTooLarge(10 << 20), want: "400 invalid_request invalid_request", message: "prompt is too long: the request body is larger than 10 MiB"},
		{failure: errMalformedBody, want: "400 invalid_request invalid_request", message: "chunked"},
		{failure: errInternal(cause), want: "500 internal internal", message: "bug"},
		{failure: errResponseRead(cause), want: "502 response_read response_read", message: "broke off"},
		{failure: errNotConnected, want: "503 not_connected ", message: "tailnet", header: "Retry-After: 2"},
		{failure: errLookupFailed, want: "503 caller_unknown ", message: "tailscaled", header: "Retry-After: 1, X-Should-Retry: true"},
		{failure: errUnknownCaller, want: "403 forbidden ", message: "tailnet"},
		{failure: errShuttingDown, want: "503 shutting_down ", message: "shutting down", header: "Connection: close, X-Should-Retry: true"},
		{failure: errConnectMethod, want: "405 method_not_allowed ", message: "CONNECT", header: "Allow: GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"},
		{failure: errSilentUpload, want: "408 request_timeout ", message: "stopped arriving"},
		{failure: errSlowUpload, want: "408 request_timeout ", message: "too slowly"},
	} {
		f := row.failure
		equal(t, row.message, fmt.Sprint(f.status, " ", f.code, " ", f.errorType), row.want)
		holds(t, strings.Contains(f.message, row.message), "%+v, want %+v", f, row)
		var header []string
		for name, values := range checkErrorBody(t, f, "req_1") {
			if !strings.HasPrefix(name, "Content-") {
				header = append(header, name+": "+values[0])
			}
		}
		slices.Sort(header)
		equal(t, row.want+": the header", strings.Join(header, ", "), row.header)
	}
}

// FuzzErrorBody: whatever a failure says, the client gets just that, and nothing of what an error quotes.
func FuzzErrorBody(f *testing.F) {
	for _, s := range []string{
		"", "plain", "\"quoted\" \\ /", "\x00\n\r\t\x1f\x7f", "é — 世界 😀", "\u2028\u2029\ufeff\ufffd", "\xff\xc3(\xed\xa0\x80",
		"<script>&amp;", `{"type":"error"}`, "a: \"b\r\n\r\nHTTP/1.1 200 OK",
	} {
		f.Add(s, s, s, s)
		f.Add("malformed header: ", "", s, "req_1")
	}
	f.Fuzz(func(t *testing.T, code, message, theirs, id string) {
		checkErrorBody(t, &failure{status: http.StatusBadGateway, code: code, message: message}, id)
		for _, failed := range []func(error) *failure{
			errConnection, errResponseRead, errInternal, func(err error) *failure { return errTimeout(3, err) },
		} {
			checkErrorBody(t, failed(errors.New(message)), id)

			// As net/http words it, with what the peer has sent in quotes.
			unquoted := strings.ReplaceAll(message, `"`, "")
			got, want := failed(fmt.Errorf("%s: %q, %s", unquoted, theirs, code)), failed(fmt.Errorf("%s: %q", unquoted, ""))
			equal(t, "the error without the peer's words", got.Error(), want.Error())
			equal(t, "the message without them", got.message, want.message)
			said := unquoted == strings.TrimRight(unquoted, " :=")
			holds(t, !said || strings.HasSuffix(got.Error(), unquoted), "%q lacks what is not the peer's, %q", got, unquoted)
		}
	})
}
