package fakeanthropic

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"
)

// OAuthBeta is the beta without which the real API refuses OAuth tokens.
const OAuthBeta = "oauth-2025-04-20"

// maxRequest is the real API's limit for a Messages request, in bytes.
const maxRequest = 32 << 20

// API answers as Anthropic's API does: POST /v1/messages (also as an event stream), POST /v1/messages/count_tokens and GET
// /v1/models, with a bearer token and [OAuthBeta], else with 401. The zero value answers at once.
type API struct {
	Deltas   int           // text deltas of a message or stream; 0 means 5
	Interval time.Duration // between the events of a stream
	StallAt  int           // if not 0, a stream falls silent after that many deltas
}

func (a API) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	setHeaders(w.Header())
	if problem := unauthorized(r.Header); problem != "" {
		writeError(w, http.StatusUnauthorized, "authentication_error", problem)
		return
	}
	switch r.Method + " " + r.URL.Path {
	case "POST /v1/messages":
		a.messages(w, r)
	case "POST /v1/messages/count_tokens":
		a.countTokens(w, r)
	case "GET /v1/models":
		writeJSON(w, http.StatusOK, models)
	default:
		writeError(w, http.StatusNotFound, "not_found_error", "Not found: "+r.Method+" "+r.URL.Path)
	}
}

// unauthorized says, in the real API's words, why it would refuse these headers.
func unauthorized(h http.Header) string {
	token, bearer := strings.CutPrefix(h.Get("Authorization"), "Bearer ")
	if !bearer || token == "" {
		return "x-api-key header is required"
	}
	betas := strings.Split(strings.Join(h.Values("Anthropic-Beta"), ","), ",")
	if !slices.ContainsFunc(betas, func(b string) bool { return strings.TrimSpace(b) == OAuthBeta }) {
		return "OAuth authentication is currently not supported."
	}
	return ""
}

// setHeaders sets what every answer of the real API carries.
func setHeaders(h http.Header) {
	h.Set("Request-Id", "req_fake_"+time.Now().Format("150405.000000000"))
	h.Set("Anthropic-Organization-Id", "00000000-0000-4000-8000-000000000000")
	h.Set("Anthropic-Ratelimit-Requests-Limit", "4000")
	h.Set("Anthropic-Ratelimit-Requests-Remaining", "3999")
	h.Set("Anthropic-Ratelimit-Requests-Reset", "2030-01-01T00:00:00Z")
	h.Set("Via", "1.1 fake-edge")
	for name, value := range PlanWindows {
		h.Set(name, value)
	}
}

// PlanWindows are what answers to subscribers' tokens carry besides (as anomalyco/opencode#49499 and
// anthropics/claude-code#12829 show them; the utilizations are spent fractions).
var PlanWindows = map[string]string{
	"Anthropic-Ratelimit-Unified-Status":               "allowed",
	"Anthropic-Ratelimit-Unified-5h-Utilization":       "0.42",
	"Anthropic-Ratelimit-Unified-5h-Reset":             "1893456000",
	"Anthropic-Ratelimit-Unified-7d-Utilization":       "0.30",
	"Anthropic-Ratelimit-Unified-7d-Reset":             "2030-01-01T00:00:00Z",
	"Anthropic-Ratelimit-Unified-Representative-Claim": "five_hour",
}

// messageRequest is the part of a request that matters here.
type messageRequest struct {
	Model    string            `json:"model"`
	Stream   bool              `json:"stream"`
	Messages []json.RawMessage `json:"messages"`
}

// readRequest decodes the body; on failure it answers 400 and returns false.
func readRequest(w http.ResponseWriter, r *http.Request) (messageRequest, bool) {
	var req messageRequest
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRequest))
	if err == nil {
		err = json.Unmarshal(body, &req)
	}
	if err == nil && len(req.Messages) == 0 {
		err = fmt.Errorf("messages: Field required")
	}
	if err != nil {
		writeError(w, http.StatusBadRequest, "invalid_request_error", err.Error())
		return req, false
	}
	return req, true
}

func (a API) deltas() []string {
	n := a.Deltas
	if n == 0 {
		n = 5
	}
	words := make([]string, n)
	for i := range words {
		words[i] = fmt.Sprintf("word%d ", i)
	}
	return words
}

func (a API) messages(w http.ResponseWriter, r *http.Request) {
	req, ok := readRequest(w, r)
	if !ok {
		return
	}
	if req.Stream {
		a.stream(w, r, req)
		return
	}
	msg := message(req.Model)
	msg["content"] = []object{{"type": "text", "text": strings.Join(a.deltas(), "")}}
	msg["stop_reason"] = "end_turn"
	writeJSON(w, http.StatusOK, msg)
}

func (a API) countTokens(w http.ResponseWriter, r *http.Request) {
	if req, ok := readRequest(w, r); ok {
		writeJSON(w, http.StatusOK, object{"input_tokens": 10 * len(req.Messages)})
	}
}

// object is a JSON object.
type object = map[string]any

var models = object{
	"data": []object{{
		"type": "model", "id": "claude-fake-1", "display_name": "Claude Fake 1", "created_at": "2025-01-01T00:00:00Z",
	}},
	"first_id": "claude-fake-1", "last_id": "claude-fake-1", "has_more": false,
}

// message is a message before any content.
func message(model string) object {
	return object{
		"id": "msg_fake_01", "type": "message", "role": "assistant", "model": model, "content": []object{},
		"stop_reason": nil, "stop_sequence": nil,
		"usage": object{"input_tokens": 10, "output_tokens": 1},
	}
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(body)
}

func writeError(w http.ResponseWriter, status int, kind, text string) {
	writeJSON(w, status, object{
		"type":       "error",
		"error":      object{"type": kind, "message": text},
		"request_id": w.Header().Get("Request-Id"),
	})
}
