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
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzErrorBody: whatever a failure says, the client gets valid HTTP with JSON of the specified shape that says just that,
// and nothing of what an error quotes.
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
			if got.Error() != want.Error() || got.message != want.message {
				t.Errorf("%q and %q, but without the peer's %q %q and %q", got, got.message, theirs, want, want.message)
			}
		}
	})
}

// checkErrorBody checks what a client gets of a failure.
func checkErrorBody(t *testing.T, f *failure, id string) {
	t.Helper()
	w := httptest.NewRecorder()
	f.writeTo(w, id)
	var wire bytes.Buffer
	if err := w.Result().Write(&wire); err != nil {
		t.Fatal(err)
	}
	a, err := http.ReadResponse(bufio.NewReader(&wire), nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(a.Body)
	isJSON := a.Header.Get("Content-Type") == "application/json"
	if err != nil || a.StatusCode != f.status || a.ContentLength != int64(len(body)) || !isJSON {
		t.Errorf("status %d, %d bytes, header %v: %v", a.StatusCode, len(body), a.Header, err)
	}
	line, rest, ok := strings.Cut(string(body), "\n")
	if !ok || rest != "" || !utf8.ValidString(line) {
		t.Errorf("not one line of text: %q", body)
	}
	valid := func(s string) string { return string([]rune(s)) } // what is not UTF-8 is replaced, byte by byte
	want := map[string]any{"type": "error", "request_id": valid(id), "error": map[string]any{
		"type": "proxy_error", "code": valid(f.code), "message": valid(f.message), "request_id": valid(id)}}
	var got any
	if err := json.Unmarshal(body, &got); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("the body %s says %v, want %v: %v", body, got, want, err)
	}
}
