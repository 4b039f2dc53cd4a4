package e2e

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

const tenMiB = 10 << 20

// TestLargestBody sends the largest body allowed there and back, bit for bit.
func TestLargestBody(t *testing.T) {
	t.Parallel()
	body := pattern(tenMiB)
	sum := sha256.Sum256(body)
	want := hex.EncodeToString(sum[:])
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			all, err := io.ReadAll(r.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			w.Write(all)
		})
		up := upstream(t, protocol, echo)
		p := proxyTo(t, up, "")
		for name, reader := range map[string]io.Reader{
			"declared": bytes.NewReader(body),
			"chunked":  io.MultiReader(bytes.NewReader(body)), // hides the length
		} {
			a := roundTrip(t, client(t), newRequest(t, "POST", p.URL()+"/v1/messages", reader))
			if a.StatusCode != 200 {
				t.Fatalf("%s: status %d: %.200s", name, a.StatusCode, a.body)
			}
			reqs := up.Requests()
			got := reqs[len(reqs)-1]
			if got.BodyLen != tenMiB || got.BodySHA256 != want {
				t.Errorf("%s: the upstream got %d bytes with hash %s, want %d with %s", name, got.BodyLen, got.BodySHA256, tenMiB, want)
			}
			if back := sha256.Sum256([]byte(a.body)); back != sum {
				t.Errorf("%s: %d bytes came back, not those that were sent", name, len(a.body))
			}
		}
		for _, line := range completed(t, p, 2) {
			if line.Number("bytes_in") != tenMiB || line.Number("bytes_out") != tenMiB {
				t.Errorf("log line %s: want bytes_in and bytes_out %d", line.Raw, tenMiB)
			}
		}
	})
}

// TestRefusedWhileSending shows that a client that has more to send, and waits
// with it, is told at once that its request is refused.
func TestRefusedWhileSending(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, answerOK)
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	tooMuch := strings.Repeat("x", 1<<20+1)
	tests := []struct {
		name   string
		lines  []string
		status int
	}{
		{name: "counted", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "", "200000\r\n" + tooMuch}, status: 400},
		{name: "declared", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 2097152", "", "x"}, status: 400},
		{name: "malformed", lines: []string{"POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "", "zz\r\n"}, status: 400},
		{name: "CONNECT", lines: []string{"CONNECT x:443 HTTP/1.1", "Host: x", "Content-Length: 10", "", "x"}, status: 405},
		{name: "our own path", lines: []string{"POST /health HTTP/1.1", "Host: proxy", "Content-Length: 10", "", "x"}, status: 405},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, p)
			c.SetDeadline(time.Now().Add(10 * time.Second)) // nothing else ends a wait for what never comes
			c.send(t, tt.lines...)
			if a := c.answer(t, "POST"); a.StatusCode != tt.status {
				t.Errorf("status %d, want %d", a.StatusCode, tt.status)
			}
			c.checkClosed(t)
		})
	}
}
