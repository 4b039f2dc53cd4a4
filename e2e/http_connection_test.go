package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// checkConnectionError checks for one failed request of error_type connection.
func checkConnectionError(t *testing.T, p *proxytest.Proxy, a answer) {
	t.Helper()
	checkProxyError(t, a, http.StatusBadGateway, "connection")
	if line := completed(t, p, 1)[0]; line.Text("error") == "" || line.Number("status") != 502 {
		t.Errorf("log line %s: want status 502 and an error", line.Raw)
	}
	checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "connection")
	checkMetric(t, p, 1, "proxy_upstream_errors_total")
}

func TestUpstreamRefuses(t *testing.T) {
	t.Parallel()
	p := proxytest.Local(t, "http://"+closedPort(t), "")
	checkConnectionError(t, p, post(t, p, messageBody))
}

func TestUpstreamNameUnknown(t *testing.T) {
	t.Parallel()
	// A label over 63 characters is no DNS name: refused without asking anyone.
	p := proxytest.Local(t, "https://"+strings.Repeat("x", 64)+".invalid", "")
	checkConnectionError(t, p, post(t, p, messageBody))
}

func TestUpstreamCertificateUnknown(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxytest.Local(t, up.URL, "") // without SSL_CERT_FILE
	checkConnectionError(t, p, post(t, p, messageBody))
}

func TestUpstreamHandshakeHangs(t *testing.T) {
	t.Parallel()
	addr := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
		io.Copy(io.Discard, r) // until the proxy gives up
	})
	p := proxytest.Local(t, "https://"+addr, "proxy.connect_timeout_secs = 1")
	start := time.Now()
	a := post(t, p, messageBody)
	// Nothing was sent, so one repetition is allowed.
	if took := time.Since(start); took < time.Second || took > 2*time.Second+slack {
		t.Errorf("gave up after %v, want one or two connect timeouts of 1s", took)
	}
	checkConnectionError(t, p, a)
}

// TestUpstreamDropsRequest shows that a request that may have been processed is
// never sent again.
func TestUpstreamDropsRequest(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"POST", "GET"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			var got atomic.Int32
			addr := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
				if _, err := readRequest(r); err == nil {
					got.Add(1)
				}
			})
			p := proxytest.Local(t, "http://"+addr, "")
			a := roundTrip(t, client(t), newRequest(t, method, p.URL()+"/v1/messages", strings.NewReader(messageBody)))
			checkConnectionError(t, p, a)
			if n := got.Load(); n != 1 {
				t.Errorf("the upstream got the request %d times, want once", n)
			}
		})
	}
}

// TestStaleConnection shows that a pooled connection that the upstream drops
// together with the next request costs at most that request's only delivery.
func TestStaleConnection(t *testing.T) {
	t.Parallel()
	for _, idempotent := range []string{"", "Idempotency-Key"} {
		t.Run("POST "+idempotent, func(t *testing.T) {
			t.Parallel()
			var second, reused atomic.Int32
			addr := rawUpstream(t, func(n int, conn net.Conn, r *bufio.Reader) {
				for {
					req, err := readRequest(r)
					if err != nil {
						return
					}
					if req.URL.Path == "/second" {
						second.Add(1)
						if n == 1 {
							reused.Add(1)
						}
						return
					}
					io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				}
			})
			p := proxytest.Local(t, "http://"+addr, "")
			if a := post(t, p, messageBody); a.StatusCode != 200 {
				t.Fatalf("first request: status %d", a.StatusCode)
			}
			req := newRequest(t, "POST", p.URL()+"/second", strings.NewReader(messageBody))
			if idempotent != "" {
				req.Header.Set(idempotent, "key-1")
			}
			checkProxyError(t, roundTrip(t, client(t), req), http.StatusBadGateway, "connection")
			if reused.Load() == 0 {
				t.Error("the second request came on a connection of its own: nothing was shown")
			}
			if n := second.Load(); n != 1 {
				t.Errorf("the upstream got the second request %d times, want once", n)
			}
		})
	}
}

// TestConnectionClosedWhileIdle shows that clients notice nothing when the
// upstream closes idle connections, as Anthropic's edge does.
func TestConnectionClosedWhileIdle(t *testing.T) {
	t.Parallel()
	noticed := make(chan bool, 1)
	addr := rawUpstream(t, func(n int, conn net.Conn, r *bufio.Reader) {
		if _, err := readRequest(r); err != nil {
			return
		}
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		conn.(*net.TCPConn).CloseWrite() // without having said so
		_, err := r.ReadByte()
		noticed <- err == io.EOF // the proxy closed too, and sent nothing more
	})
	p := proxytest.Local(t, "http://"+addr, "")
	for i := range 20 {
		if a := post(t, p, messageBody); a.StatusCode != 200 || a.body != "ok" {
			t.Fatalf("request %d: %d %q", i+1, a.StatusCode, a.body)
		}
		if !<-noticed {
			t.Fatal("the proxy used a connection that the upstream had closed")
		}
	}
}

// TestBrokenAnswer shows that an answer that the upstream breaks off reaches the
// client as broken.
func TestBrokenAnswer(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		answer string
	}{
		{name: "declared length", answer: "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this"},
		{name: "chunked", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n"},
		{name: "malformed chunk", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nzz\r\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			addr := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
				readRequest(r)
				io.WriteString(conn, tt.answer)
			})
			p := proxytest.Local(t, "http://"+addr, "")
			resp, err := client(t).Do(newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(messageBody)))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err == nil {
				t.Error("the answer ended as if it were complete")
			}
			if string(body) != "only this" {
				t.Errorf("body %q, want what the upstream sent", body)
			}
			completed(t, p, 1)
			checkMetric(t, p, 1, "proxy_upstream_errors_total", "error_type", "response_read")
			checkMetric(t, p, 1, "proxy_upstream_errors_total")
		})
	}
}

// TestOddAnswers covers upstream answers that are legal but rare, and one that
// the proxy can't pass on.
func TestOddAnswers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		answer string
		status int
		body   string // "" for the proxy's own
	}{
		{name: "early hints dropped", answer: "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 200, body: "ok"},
		{name: "processing dropped", answer: "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 200, body: "ok"},
		{name: "body to the end of the connection", answer: "HTTP/1.0 200 OK\r\n\r\nok", status: 200, body: "ok"},
		{name: "unknown status", answer: "HTTP/1.1 799 Odd\r\nContent-Length: 3\r\n\r\nodd", status: 799, body: "odd"},
		{name: "switching protocols refused", answer: "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n", status: 502},
		{name: "no HTTP at all", answer: "SSH-2.0-OpenSSH_9.9\r\n", status: 502},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			addr := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
				readRequest(r)
				io.WriteString(conn, tt.answer)
			})
			p := proxytest.Local(t, "http://"+addr, "")
			a := exchange(t, p, "GET /v1/models HTTP/1.1", "Host: proxy", "Upgrade: websocket", "Connection: upgrade", "", "")
			if a.StatusCode != tt.status || (tt.body != "" && a.body != tt.body) {
				t.Errorf("answer %d %q, want %d %q", a.StatusCode, a.body, tt.status, tt.body)
			}
			if tt.status == http.StatusBadGateway {
				checkConnectionError(t, p, a)
			}
		})
	}
}
