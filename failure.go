package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// errorType is a value of the label error_type of proxy_upstream_errors_total.
type errorType string

const (
	typeTimeout        errorType = "timeout"         // no response headers in time, in the last attempt
	typeConnection     errorType = "connection"      // DNS, dial, TLS, or lost before the headers
	typeInvalidRequest errorType = "invalid_request" // body too large or malformed
	typeResponseRead   errorType = "response_read"   // the upstream's body broke or fell silent
	typeInternal       errorType = "internal"        // a bug of ours
)

// errorTypes are all of them, in the order of the metrics page.
var errorTypes = [...]errorType{typeTimeout, typeConnection, typeInvalidRequest, typeResponseRead, typeInternal}

// statusClientGone labels requests whose client left, or stopped reading, before the answer was complete. It is never sent;
// the number is nginx's.
const statusClientGone = 499

// failure is a request that the proxy itself answers with an error, or whose answer it cuts.
type failure struct {
	status    int       // what the client gets, if it has nothing yet
	code      string    // error.code in the body
	errorType errorType // empty: not counted as an upstream error
	message   string    // what went wrong and what to do, for the client
	header    []string  // of the answer besides: names and values in turn
	cause     error     // for the log, if not nil; see describe
}

// Error implements error: the cause, or else what the client is told.
func (f *failure) Error() string {
	if f.cause != nil {
		return f.code + ": " + describe(f.cause)
	}
	return f.code + ": " + f.message
}

// Unwrap gives errors.Is the cause.
func (f *failure) Unwrap() error { return f.cause }

// Failures that need no details.
var (
	errClientGone    = refusal(statusClientGone, "client_gone", "the client left")
	errSlowReader    = refusal(statusClientGone, "client_gone", "the client stopped reading the answer")
	errShuttingDown  = refusal(503, "shutting_down", "the proxy is shutting down; please try again", "Connection", "close", "X-Should-Retry", "true")
	errNotConnected  = refusal(503, "not_connected", "the proxy is not connected to the tailnet yet; please try again in a moment", "Retry-After", "2")
	errLookupFailed  = refusal(503, "caller_unknown", "tailscaled has not said in time who is calling; please try again", "Retry-After", "1", "X-Should-Retry", "true")
	errUnknownCaller = refusal(403, "forbidden", "only callers on the tailnet may use this proxy: connect to its tailnet name, not to its pod or service address")
	errConnectMethod = refusal(405, "method_not_allowed", "CONNECT is not supported: use the proxy's address as the API's base URL, not as a forward proxy",
		"Allow", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	errSilentUpload  = refusal(408, "request_timeout", "the request body stopped arriving (timeout_secs)")
	errSlowUpload    = refusal(408, "request_timeout", "the request body came too slowly while others waited (body_memory_mb, max_connections)")
	errMalformedBody = invalidRequest("the request body is not valid HTTP (broken chunked encoding)")
)

// refusal is a failure that is not counted as an upstream's. header holds names and values in turn.
func refusal(status int, code, message string, header ...string) *failure {
	return &failure{status: status, code: code, message: message, header: header}
}

// invalidRequest is a request whose body can't be forwarded.
func invalidRequest(message string) *failure {
	return counted(http.StatusBadRequest, typeInvalidRequest, nil, message)
}

// errBodyTooLarge refuses a body of more than limit bytes. The contract says 400, not HTTP's 413; the message begins with
// the API's own words for it, on which Claude Code compacts the conversation and goes on.
func errBodyTooLarge(limit int64) *failure {
	return invalidRequest(fmt.Sprintf("prompt is too long: the request body is larger than %d MiB, this proxy's limit (max_body_mb)", limit>>20))
}

// errNotGranted refuses a caller whom the tailnet's policy does not grant the capability (tailscale.capability).
func errNotGranted(capability, node string) *failure {
	return refusal(http.StatusForbidden, "forbidden", fmt.Sprintf("the node %s is not granted %s: an administrator can grant it in the tailnet's policy file (grants, app)", node, capability))
}

// errTimeout says that the last of attempts brought no response headers in time.
func errTimeout(attempts int, cause error) *failure {
	f := counted(http.StatusGatewayTimeout, typeTimeout, cause,
		fmt.Sprintf("the upstream sent no response headers in time, in %d attempt(s) (timeout_secs, timeout_retries)", attempts))
	f.header = []string{"X-Should-Retry", "false"} // SDKs would multiply the attempts
	return f
}

// errConnection says that the upstream could not be reached, or was lost before its answer began.
func errConnection(cause error) *failure {
	return counted(http.StatusBadGateway, typeConnection, cause, "no answer from the upstream: "+describe(cause))
}

// errResponseRead cuts an answer whose upstream broke off or fell silent.
func errResponseRead(cause error) *failure {
	return counted(http.StatusBadGateway, typeResponseRead, cause, "the upstream's answer broke off: "+describe(cause))
}

// errInternal is a panic.
func errInternal(cause error) *failure {
	return counted(http.StatusInternalServerError, typeInternal, cause, "a bug in the proxy; its log has the details under this request id")
}

// counted is a failure that is counted under its type, which is its code.
func counted(status int, t errorType, cause error, message string) *failure {
	return &failure{status: status, code: string(t), errorType: t, cause: cause, message: message}
}

// departure says why a request's context ended, or is about to: its client left, or the process stops.
func departure(ctx context.Context) *failure {
	if f, ok := errors.AsType[*failure](context.Cause(ctx)); ok {
		return f
	}
	return errClientGone
}

// asFailure returns err as a failure, nil if err is nil. An error that is no failure is a bug: errInternal.
func asFailure(err error) *failure {
	f, ok := errors.AsType[*failure](err)
	if err != nil && !ok {
		return errInternal(err)
	}
	return f
}

// writeTo sends the failure as an error body that Anthropic's SDKs and people can read.
func (f *failure) writeTo(w http.ResponseWriter, requestID string) {
	type inner struct {
		Type      string `json:"type"`
		Code      string `json:"code"`
		Message   string `json:"message"`
		RequestID string `json:"request_id"`
	}
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)
	encoder.Encode(struct {
		Type      string `json:"type"`
		Error     inner  `json:"error"`
		RequestID string `json:"request_id"`
	}{"error", inner{"proxy_error", f.code, f.message, requestID}, requestID})

	header := w.Header()
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(body.Len()))
	for i := 0; i+1 < len(f.header); i += 2 {
		header.Set(f.header[i], f.header[i+1])
	}
	w.WriteHeader(f.status)
	w.Write(body.Bytes())
}

// describe returns err's text up to its first double quote: what net/http quotes in its errors comes from the peer, and
// headers and bodies belong in no log. Words of our own must therefore not use quotes.
func describe(err error) string {
	text := err.Error()
	if i := strings.IndexByte(text, '"'); i >= 0 {
		text = strings.TrimRight(text[:i], " :=")
	}
	return text
}
