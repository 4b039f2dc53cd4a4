package main

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// endpoints are the paths that the proxy answers itself.
type endpoints struct {
	metrics *metrics
	tailnet *tailnet // nil with -local
	started time.Time
}

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

// ownWriteTimeout is how long a client may take to read such an answer.
const ownWriteTimeout = 30 * time.Second

// ServeHTTP implements http.Handler for the listener that has nothing else.
func (e *endpoints) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header()[requestIDHeader] = []string{newRequestID()}
	if !e.serve(w, r, requestTarget(r).path) {
		leaveUnread(w)
		http.NotFound(w, r)
	}
}

// serve answers a request for one of the paths, and reports whether path is one.
func (e *endpoints) serve(w http.ResponseWriter, r *http.Request, path string) bool {
	var answer func() (status int, contentType string, body []byte)
	switch path {
	case "/health":
		answer = e.health
	case "/livez":
		answer = e.live
	case "/metrics":
		answer = func() (int, string, []byte) { return http.StatusOK, metricsType, e.metrics.page() }
	default:
		return false
	}
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(ownWriteTimeout))
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
	return true
}

// health says whether the proxy has its place on the tailnet: 200, or 503 if not.
func (e *endpoints) health() (int, string, []byte) {
	h := health{
		Status:         "healthy",
		Tailnet:        "disabled",
		UptimeSeconds:  int64(time.Since(e.started) / time.Second),
		RequestsServed: e.metrics.requestsTotal(),
		ErrorsTotal:    e.metrics.errorsTotal(),
	}
	status := http.StatusOK
	if e.tailnet != nil {
		now := e.tailnet.current()
		h.Tailnet, h.TailnetHostname, h.TailnetIP = "connected", now.hostname, now.ip
		if now.problem != nil {
			h.Status, h.Tailnet, h.TailnetHostname, h.TailnetIP = "degraded", "not_connected", "", ""
			status = http.StatusServiceUnavailable
		}
	}
	body, _ := json.Marshal(h)
	return status, "application/json", body
}

// live says that the process serves, whatever the tailnet does: what a liveness probe asks.
func (e *endpoints) live() (int, string, []byte) {
	return http.StatusOK, "application/json", []byte(`{"status":"alive"}`)
}
