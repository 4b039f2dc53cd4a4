package main

import (
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// health is the body of GET /health. The keys and their order are part of the contract with users.
type health struct {
	Status          string `json:"status"`  // healthy, degraded
	Tailnet         string `json:"tailnet"` // connected, not_connected, disabled
	TailnetHostname string `json:"tailnet_hostname,omitempty"`
	TailnetIP       string `json:"tailnet_ip,omitempty"`
	UptimeSeconds   int64  `json:"uptime_seconds"`
	RequestsServed  uint64 `json:"requests_served"` // finished proxied requests, failures included
	ErrorsTotal     uint64 `json:"errors_total"`    // the sum of proxy_upstream_errors_total
}

// serveOwn answers a request for an endpoint of our own, which take GET and HEAD only.
func serveOwn(w http.ResponseWriter, r *http.Request, answer func() (status int, contentType string, body []byte)) {
	if conn := connOf(r); conn != nil {
		conn.writeDeadline.begin()
		conn.writeDeadline.extend(conn, ownWriteTimeout)
	}
	status, contentType, body := http.StatusMethodNotAllowed, "text/plain; charset=utf-8", []byte("only GET and HEAD are allowed here\n")
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		status, contentType, body = answer()
	} else {
		w.Header().Set("Allow", "GET, HEAD")
	}
	if r.ContentLength != 0 {
		leaveUnread(w)
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	w.Write(body)
}

// leaveUnread has the connection closed after an answer that does not wait for the request's body:
// net/http would read that first, for as long as the client likes. What still comes within unreadGrace is
// read, since a connection that is closed on unread bytes is reset, and the answer lost.
func leaveUnread(w http.ResponseWriter) {
	w.Header().Set("Connection", "close")
	// Hitting a limit has net/http wait for half a second before it closes, so that the answer can be read. On a
	// client that has asked for the close itself it would not wait otherwise.
	http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1))
	http.NewResponseController(w).SetReadDeadline(time.Now().Add(unreadGrace))
}

// unreadGrace is how long the rest of a refused request's body is waited for.
const unreadGrace = time.Second

// ownWriteTimeout is how long a client may take to read such an answer.
const ownWriteTimeout = 30 * time.Second

// serveHealth says whether the proxy has its place on the tailnet: 200, or 503 if not.
func (p *proxy) serveHealth() (int, string, []byte) {
	h := health{
		Status:         "healthy",
		Tailnet:        "disabled",
		UptimeSeconds:  int64(time.Since(p.started) / time.Second),
		RequestsServed: p.metrics.requestsTotal(),
		ErrorsTotal:    p.metrics.errorsTotal(),
	}
	status := http.StatusOK
	if p.tailnet != nil {
		now := p.tailnet.current()
		h.Tailnet, h.TailnetHostname, h.TailnetIP = "connected", now.hostname, now.ip
		if now.problem != nil {
			h.Status, h.Tailnet, h.TailnetHostname, h.TailnetIP = "degraded", "not_connected", "", ""
			status = http.StatusServiceUnavailable
		}
	}
	body, _ := json.Marshal(h)
	return status, "application/json", body
}

// serveLive says that the process serves, whatever the tailnet does: what a liveness probe asks.
func (p *proxy) serveLive() (int, string, []byte) {
	return http.StatusOK, "application/json", []byte(`{"status":"alive"}`)
}
