package e2e

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

var timestamp = regexp.MustCompile(`^\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"(ERROR|WARN|INFO|DEBUG|TRACE)","message":"`)

// checkLines checks that all lines are JSON and begin with the keys that all have.
func checkLines(t *testing.T, lines []proxytest.Line) {
	t.Helper()
	for _, line := range lines {
		if line.Fields == nil || !timestamp.MatchString(line.Raw) {
			t.Errorf("log line %s: want JSON that begins with timestamp, level, message", line.Raw)
		}
	}
}

// TestPlanWindows: what the API says of its callers' plan windows passes untouched, is logged, and counted.
func TestPlanWindows(t *testing.T) {
	t.Parallel()
	var windows atomic.Pointer[map[string]string]
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range *windows.Load() {
			w.Header().Set(name, value)
		}
	}))
	p := proxyTo(t, up, "")
	const status = "Anthropic-Ratelimit-Unified-Status"
	for i, row := range []struct {
		sent   map[string]string
		counts string // as
		logged [3]string
	}{
		{sent: fakeanthropic.PlanWindows, counts: "allowed", logged: [3]string{"allowed", "0.42", "0.30"}},
		{sent: map[string]string{status: "allowed_warning"}, counts: "allowed_warning", logged: [3]string{"allowed_warning"}},
		{sent: map[string]string{status: "rejected"}, counts: "rejected", logged: [3]string{"rejected"}},
		{sent: map[string]string{status: strings.Repeat("x", 300)}, counts: "other", logged: [3]string{strings.Repeat("x", 253) + "…"}},
		{sent: map[string]string{}},
	} {
		windows.Store(&row.sent)
		before := proxytest.Scrape(t, p)
		a := roundTrip(t, client(t), newRequest(t, "GET", p.URL()+"/", nil))
		for name, value := range row.sent {
			if got := a.Header.Get(name); got != value {
				t.Errorf("%s: the client got %q, want %q", name, got, value)
			}
		}
		line := completed(t, p, i+1)[i]
		if got := [3]string{line.Text("ratelimit_status"), line.Text("ratelimit_5h"), line.Text("ratelimit_7d")}; got != row.logged {
			t.Errorf("logged %q, want %q", got, row.logged)
		}
		after := proxytest.Scrape(t, p)
		for _, label := range []string{"allowed", "allowed_warning", "rejected", "other"} {
			const name = "proxy_upstream_ratelimit_status_total"
			if grown := after.Value(name, "status", label) - before.Value(name, "status", label); (grown == 1) != (label == row.counts) {
				t.Errorf("%q: %s has grown by %v", row.counts, label, grown)
			}
		}
	}
}

// TestSessionID: Claude Code's own name of the session is logged, and nothing else that stands in its place.
func TestSessionID(t *testing.T) {
	t.Parallel()
	p := proxyTo(t, upstream(t, fakeanthropic.HTTP2, nil), "")
	for i, row := range []struct {
		id     string
		logged bool
	}{
		{"0f5b1c9e-9c3b-4d8e-8d5f-2a2b3c4d5e6f", true}, {"A.b_c-9", true}, {strings.Repeat("x", 64), true},
		{strings.Repeat("x", 65), false}, {"", false}, {"a b", false}, {`a"b`, false}, {"ä", false},
	} {
		req := newRequest(t, "POST", p.URL()+"/v1/messages", strings.NewReader(messageBody))
		req.Header.Set("X-Claude-Code-Session-Id", row.id)
		roundTrip(t, client(t), req)
		line := completed(t, p, i+1)[i]
		if got := line.Text("session_id"); row.logged && got != row.id || !row.logged && strings.Contains(line.Raw, "session_id") {
			t.Errorf("%q is logged as %q, want it logged: %t", row.id, got, row.logged)
		}
	}
}

func TestLogLevels(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	for _, tt := range []struct {
		value   string
		lowest  string
		warning bool
	}{
		{value: "warn", lowest: "WARN"}, {value: "error", lowest: "ERROR"}, {value: "info", lowest: "INFO"}, {value: "", lowest: "INFO"},
		{value: "DeBuG", lowest: "DEBUG"}, {value: "TRACE", lowest: "TRACE"}, {value: "loud", lowest: "INFO", warning: true},
	} {
		t.Run(tt.value, func(t *testing.T) {
			t.Parallel()
			p := proxytest.Launch(t, proxytest.Options{
				Args: []string{"-local", "-listen", "127.0.0.1:0", "-upstream", up.URL},
				Env:  append(up.Env(), "LOG_LEVEL="+tt.value),
			})
			if err := p.WaitListening(proxytest.Timeout); err != nil {
				t.Fatal(err)
			}
			post(t, p, messageBody)
			signalled(t, p, syscall.SIGTERM) // all that it says is there now
			order := []string{"TRACE", "DEBUG", "INFO", "WARN", "ERROR"}
			warned := false
			for _, line := range p.Logs() {
				if slices.Index(order, line.Text("level")) < slices.Index(order, tt.lowest) {
					t.Errorf("log line %s: below %s", line.Raw, tt.lowest)
				}
				warned = warned || line.Text("level") == "WARN" && strings.Contains(line.Raw, tt.value)
			}
			if warned != tt.warning {
				t.Errorf("warned is %v, want %v:\n%s", warned, tt.warning, p.Stdout())
			}
			if tt.lowest == "INFO" && !strings.Contains(p.Stdout(), proxytest.MsgRunning) {
				t.Error("no info lines")
			}
		})
	}
}

// TestNoSecrets plants secrets wherever a client or the upstream can put one, on
// every path that a request can take, and looks for them at every log level.
func TestNoSecrets(t *testing.T) {
	t.Parallel()
	const secret = "hunter2-planted"
	for _, level := range []string{"error", "warn", "info", "debug", "trace"} {
		t.Run(level, func(t *testing.T) {
			t.Parallel()
			up := upstream(t, fakeanthropic.HTTP1, secretive(secret))
			// Breaks in the middle of a header that holds a secret.
			broken := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
				http.ReadRequest(r)
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nX-Key "+secret+"\r\n\r\n"+secret)
			})
			for _, target := range []string{up.URL, "http://" + closedPort(t), "http://" + broken} {
				p := proxytest.Launch(t, proxytest.Options{
					Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", target},
					Config: "[proxy]\ntimeout_secs = 1\ntimeout_retries = 1\nmax_body_mb = 1\n[[headers]]\nname = \"x-team-key\"\nvalue = \"" + secret + "\"",
					Env:    append(up.Env(), "LOG_LEVEL="+level),
				})
				if err := p.WaitListening(proxytest.Timeout); err != nil {
					t.Fatal(err)
				}
				requests := sendSecrets(t, p, secret)
				waitMetric(t, p, float64(requests), "proxy_requests_total")
				signalled(t, p, syscall.SIGTERM)
				if at := strings.Index(p.Stdout()+p.Stderr(), secret); at >= 0 {
					t.Errorf("a secret is in the log: %.300s", (p.Stdout() + p.Stderr())[max(0, at-150):])
				}
				checkLines(t, p.Logs())
				if (level == "debug" || level == "trace" || level == "info") && !strings.Contains(p.Stdout(), proxytest.MsgRequestCompleted) {
					t.Error("the log has no requests: nothing was shown")
				}
			}
		})
	}
}

// secretive answers with a secret in every place, or fails, as the path says.
func secretive(secret string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("X-Answer-Key", secret)
		w.Header().Set("Set-Cookie", "session="+secret)
		switch r.URL.Path {
		case "/silent":
			fakeanthropic.Silent().ServeHTTP(w, r)
		case "/drop":
			panic(http.ErrAbortHandler)
		case "/cut":
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, secret)
			fakeanthropic.Flush(w)
			panic(http.ErrAbortHandler)
		case "/error":
			http.Error(w, secret, http.StatusInternalServerError)
		default:
			io.WriteString(w, secret)
		}
	})
}

// sendSecrets sends requests that end in every way, with a secret in every place
// but the path, and returns how many are counted.
func sendSecrets(t *testing.T, p *proxytest.Proxy, secret string) int {
	t.Helper()
	c := client(t)
	paths := []string{"/ok", "/error", "/drop", "/cut", "/silent"}
	for _, path := range paths {
		req := newRequest(t, "POST", p.URL()+path+"?key="+secret, strings.NewReader(`{"prompt":"`+secret+`"}`),
			"X-Api-Key", secret, "Cookie", "a="+secret, "Anthropic-Beta", secret, "X-Stainless-Timeout", secret, "X-Request-Id", secret)
		req.Header.Set("Authorization", "Bearer "+secret)
		do(c, req) // some fail, as they should
	}
	odd := []string{
		"POST /large?" + secret + " HTTP/1.1\r\nHost: " + secret + "\r\nContent-Length: 99999999\r\n\r\n",
		"POST /chunks?" + secret + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + secret + "\r\n",
		"CONNECT api.example.com:443 HTTP/1.1\r\nHost: " + secret + "\r\n\r\n",
	}
	refused := []string{ // by net/http, and so not counted
		"GET /%zz" + secret + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\nbad header " + secret + "\r\n\r\n",
		secret + "\r\n\r\n",
	}
	counted := proxytest.Scrape(t, p).Value("proxy_requests_total")
	for _, request := range append(refused, odd...) {
		conn := dial(t, p)
		fmt.Fprint(conn, request)
		conn.answer(t, "GET")
	}
	proxytest.Eventually(t, "the odd requests counted", func() bool {
		return proxytest.Scrape(t, p).Value("proxy_requests_total") >= counted+2
	})
	return int(proxytest.Scrape(t, p).Value("proxy_requests_total"))
}
