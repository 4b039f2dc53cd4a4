package fakeanthropic

import (
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// stream answers with server-sent events in the real API's order, with a ping after the first and then after every tenth delta.
func (a API) stream(w http.ResponseWriter, r *http.Request, req messageRequest) {
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.Header().Set("Cache-Control", "no-cache")
	send := func(event object) bool {
		WriteEvent(w, event)
		select {
		case <-time.After(a.Interval):
			return true
		case <-r.Context().Done():
			return false
		}
	}
	send(object{"type": "message_start", "message": message(req.Model)})
	send(object{"type": "content_block_start", "index": 0, "content_block": object{"type": "text", "text": ""}})
	for i, text := range a.deltas() {
		if a.StallAt > 0 && i == a.StallAt {
			<-r.Context().Done()
			return
		}
		if i%10 == 0 {
			send(object{"type": "ping"})
		}
		if !send(object{"type": "content_block_delta", "index": 0, "delta": object{"type": "text_delta", "text": text}}) {
			return
		}
	}
	send(object{"type": "content_block_stop", "index": 0})
	send(object{
		"type": "message_delta", "delta": object{"stop_reason": "end_turn", "stop_sequence": nil},
		"usage": object{"output_tokens": len(a.deltas())},
	})
	WriteEvent(w, object{"type": "message_stop"})
}

// WriteEvent sends one server-sent event, named by its "type", at once.
func WriteEvent(w http.ResponseWriter, event map[string]any) {
	data, err := json.Marshal(event)
	if err != nil {
		panic(fmt.Sprintf("fakeanthropic: event is no JSON: %v", err)) // a bug in a test
	}
	fmt.Fprintf(w, "event: %s\ndata: %s\n\n", event["type"], data)
	Flush(w)
}

// Flush sends what was written so far, the headers at least.
func Flush(w http.ResponseWriter) {
	// A client that has left is the handler's context's business.
	_ = http.NewResponseController(w).Flush()
}
