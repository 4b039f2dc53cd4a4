package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/testca"
)

// serverName is what the upstream's certificate is for, beside 127.0.0.1. Not
// every contestant can verify an address.
const serverName = "localhost"

// The paths that the upstream answers. Each reads the request's body to its end
// first.
const (
	smallPath  = "/v1/messages" // with 1 KiB
	largePath  = "/v1/files/large/content"
	streamPath = "/v1/messages/stream"
)

const (
	smallAnswerSize = 1 << 10
	largeAnswerSize = 10 << 20
	// eventInterval is the time between two events of a stream.
	eventInterval = 100 * time.Millisecond
	// eventSize is about that of a short text delta of the API.
	eventSize = 160
	// streamLimit ends a stream that nobody ends.
	streamLimit = 5 * time.Minute
)

// clock is when this process began: events carry the time since then, which both
// of its ends can read.
var clock = time.Now()

// upstream is the API that everything is proxied to: TLS, HTTP/1.1 or HTTP/2 as
// the contestant prefers, in this process.
type upstream struct {
	server *httptest.Server
	addr   string
	caFile string         // PEM, of what verifies the server
	roots  *x509.CertPool // the same
}

// startUpstream starts it; http2 has it offer HTTP/2 beside HTTP/1.1.
func startUpstream(http2 bool) (*upstream, error) {
	authority, err := testca.New()
	if err != nil {
		return nil, fmt.Errorf("making the upstream's certificate: %w", err)
	}
	certificate, err := authority.Certificate(nil)
	if err != nil {
		return nil, fmt.Errorf("making the upstream's certificate: %w", err)
	}
	u := &upstream{roots: x509.NewCertPool()}
	u.roots.AppendCertsFromPEM(authority.PEM)
	mux := http.NewServeMux()
	mux.HandleFunc(smallPath, answer(bytes.Repeat([]byte("x"), smallAnswerSize), "application/json"))
	mux.HandleFunc(largePath, answer(bytes.Repeat([]byte("x"), largeAnswerSize), "application/octet-stream"))
	mux.HandleFunc(streamPath, streamEvents)
	u.server = httptest.NewUnstartedServer(requireBeta(mux))
	u.server.EnableHTTP2 = http2
	u.server.Config.ErrorLog = log.New(io.Discard, "", 0) // contestants that are stopped
	u.server.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}}
	u.server.StartTLS()
	u.addr = u.server.Listener.Addr().String()

	f, err := os.CreateTemp("", "bench-ca-*.pem")
	if err != nil {
		u.close()
		return nil, fmt.Errorf("writing the certificate: %w", err)
	}
	u.caFile = f.Name()
	defer f.Close()
	if _, err = f.Write(authority.PEM); err == nil {
		err = f.Chmod(0o644)
	}
	if err != nil {
		u.close()
		return nil, fmt.Errorf("writing the certificate: %w", err)
	}
	return u, nil
}

// close cuts all connections.
func (u *upstream) close() {
	u.server.CloseClientConnections()
	u.server.Close()
	if u.caFile != "" {
		_ = os.Remove(u.caFile) // a leftover in the temporary folder does no harm
	}
}

// requireBeta refuses requests that no contestant has added the beta to, or that
// have lost the client's.
func requireBeta(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		betas := strings.Join(r.Header["Anthropic-Beta"], ",")
		if !strings.Contains(betas, beta) || !strings.Contains(betas, clientBeta) {
			http.Error(w, fmt.Sprintf("anthropic-beta is %q, want %s and %s", betas, clientBeta, beta), http.StatusBadRequest)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// answer answers with body and the headers that the API sends.
func answer(body []byte, contentType string) http.HandlerFunc {
	length := strconv.Itoa(len(body))
	return func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return // the contestant has left
		}
		h := w.Header()
		h.Set("Content-Type", contentType)
		h.Set("Content-Length", length)
		h.Set("Request-Id", "req_011CSHoEeqs5C35K2UUqR7Fy")
		h.Set("Anthropic-Organization-Id", "00000000-0000-0000-0000-000000000000")
		h.Set("Anthropic-Ratelimit-Requests-Limit", "4000")
		h.Set("Anthropic-Ratelimit-Requests-Remaining", "3999")
		h.Set("Anthropic-Ratelimit-Requests-Reset", "2026-01-01T00:00:00Z")
		h.Set("Cf-Cache-Status", "DYNAMIC")
		_, _ = w.Write(body) // the client's end notices what is missing
	}
}

// streamEvents sends an event every eventInterval, stamped with the time, until
// the client leaves. Streams are out of step with each other.
func streamEvents(w http.ResponseWriter, r *http.Request) {
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return
	}
	w.Header().Set("Content-Type", "text/event-stream; charset=utf-8")
	w.Header().Set("Cache-Control", "no-cache")
	control := http.NewResponseController(w)
	if control.Flush() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), streamLimit)
	defer cancel()
	phase, _ := strconv.ParseFloat(r.Header.Get(phaseHeader), 64) // absent: 0
	select {
	case <-time.After(time.Duration(phase * float64(eventInterval))):
	case <-ctx.Done():
		return
	}
	ticker := time.NewTicker(eventInterval)
	defer ticker.Stop()
	for event := make([]byte, 0, eventSize); ; {
		event = appendEvent(event[:0], time.Since(clock))
		if _, err := w.Write(event); err != nil || control.Flush() != nil {
			return
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// eventPrefix begins an event; the stamp in nanoseconds follows.
const eventPrefix = `data: {"sent":`

// appendEvent appends a server-sent event of eventSize bytes.
func appendEvent(b []byte, sent time.Duration) []byte {
	b = append(b, "event: content_block_delta\n"+eventPrefix...)
	b = strconv.AppendInt(b, int64(sent), 10)
	b = append(b, `,"delta":{"type":"text_delta","text":"`...)
	const end = "\"}}\n\n"
	for len(b) < eventSize-len(end) {
		b = append(b, 'x')
	}
	return append(b, end...)
}

// parseEvent returns the stamp of a line of an event; ok is false for lines that
// have none.
func parseEvent(line []byte) (sent time.Duration, ok bool) {
	rest, found := bytes.CutPrefix(line, []byte(eventPrefix))
	digits, _, _ := bytes.Cut(rest, []byte(","))
	n, err := strconv.ParseInt(string(digits), 10, 64)
	return time.Duration(n), found && err == nil
}
