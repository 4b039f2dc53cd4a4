package e2e

import (
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestPlanWindows: what the API says of its callers' plan windows passes untouched, is logged, and counted.
func TestPlanWindows(t *testing.T) {
	t.Parallel()
	var windows atomic.Pointer[map[string]string]
	s := proxytest.NewScene(t)
	s.StartAPI(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for name, value := range *windows.Load() {
			w.Header().Set(name, value)
		}
	}), "")
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
		before := proxytest.Scrape(t, s.Proxy)
		a := s.Get("/")
		s.Passed(a, 200, "", 1)
		for name, value := range row.sent {
			if got := a.Header.Get(name); got != value {
				t.Errorf("%s: the client got %q, want %q", name, got, value)
			}
		}
		line := s.Completed()[i]
		if got := [3]string{line.Text("ratelimit_status"), line.Text("ratelimit_5h"), line.Text("ratelimit_7d")}; got != row.logged {
			t.Errorf("logged %q, want %q", got, row.logged)
		}
		after := proxytest.Scrape(t, s.Proxy)
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
	s := proxytest.NewScene(t)
	s.StartAPI(fakeanthropic.HTTP2, answerOK, "")
	for i, row := range []struct {
		id     string
		logged bool
	}{
		{"0f5b1c9e-9c3b-4d8e-8d5f-2a2b3c4d5e6f", true}, {"A.b_c-9", true}, {strings.Repeat("x", 64), true},
		{strings.Repeat("x", 65), false}, {"", false}, {"a b", false}, {`a"b`, false}, {"ä", false},
	} {
		s.Passed(s.Post("X-Claude-Code-Session-Id", row.id), 200, "ok", 1)
		line := s.Completed()[i]
		if got := line.Text("session_id"); row.logged && got != row.id || !row.logged && strings.Contains(line.Raw, "session_id") {
			t.Errorf("%q is logged as %q, want it logged: %t", row.id, got, row.logged)
		}
	}
}

// everyLine is how each line begins.
var everyLine = regexp.MustCompile(`^\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"(ERROR|WARN|INFO|DEBUG|TRACE)","message":"`)

func TestLogLevels(t *testing.T) {
	t.Parallel()
	for value, lowest := range map[string]string{
		"warn": "WARN", "error": "ERROR", "info": "INFO", "": "INFO", "DeBuG": "DEBUG", "TRACE": "TRACE", "loud": "INFO",
	} {
		t.Run(value, func(t *testing.T) {
			t.Parallel()
			s := proxytest.NewScene(t)
			s.Mute = slices.Contains([]string{"WARN", "ERROR"}, lowest)
			s.StartAPI(fakeanthropic.HTTP2, answerOK, "", "LOG_LEVEL="+value)
			s.Passed(s.Post(), 200, "ok", 1)
			if err := s.Proxy.Stop(); err != nil { // all that it says is there now
				t.Fatal(err)
			}
			order := []string{"TRACE", "DEBUG", "INFO", "WARN", "ERROR"}
			warned := false
			for _, line := range s.Proxy.Logs() {
				if !everyLine.MatchString(line.Raw) || slices.Index(order, line.Text("level")) < slices.Index(order, lowest) {
					t.Errorf("log line %s: no JSON as promised, or below %s", line.Raw, lowest)
				}
				warned = warned || line.Text("level") == "WARN" && strings.Contains(line.Raw, value)
			}
			if warned != (value == "loud") {
				t.Errorf("warned: %v:\n%s", warned, s.Proxy.Stdout())
			}
			if s.Mute {
				s.Expects = nil
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
			s := proxytest.NewScene(t)
			up := s.API(fakeanthropic.HTTP1, secretive(secret))
			// Breaks in the middle of a header that holds a secret.
			broken := s.Upstream(func(p *proxytest.Peer) {
				p.Request()
				p.Say("HTTP/1.1 200 OK\r\nX-Key " + secret + "\r\n\r\n" + secret)
			})
			for _, target := range []string{up.URL, broken.URL, s.Upstream(func(p *proxytest.Peer) { p.Reset() }).URL} {
				s.Proxy = proxytest.Launch(t, proxytest.Options{
					Args:   proxytest.Serve(target),
					Config: "[proxy]\ntimeout_secs = 1\ntimeout_retries = 1\nmax_body_mb = 1\n[[headers]]\nname = \"x-team-key\"\nvalue = \"" + secret + "\"",
					Env:    append(up.Env(), "LOG_LEVEL="+level),
				})
				proxytest.Check(t, s.Proxy.WaitListening(proxytest.Timeout))
				sendSecrets(s, secret)
				s.AtWork(0)
				proxytest.Check(t, s.Proxy.Stop())
				said := s.Proxy.Stdout() + s.Proxy.Stderr()
				if at := strings.Index(said, secret); at >= 0 {
					t.Errorf("a secret is in the log: %.300s", said[max(0, at-150):])
				}
				for _, line := range s.Proxy.Logs() {
					if !everyLine.MatchString(line.Raw) {
						t.Errorf("log line %s: no JSON as promised", line.Raw)
					}
				}
				if shown := strings.Contains(said, proxytest.MsgRequestCompleted); shown == (level == "error" || level == "warn") {
					t.Errorf("the log has requests: %v", shown)
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

// sendSecrets sends requests that end in every way, with a secret in every place but the path.
func sendSecrets(s *proxytest.Scene, secret string) {
	s.Helper()
	for _, path := range []string{"/ok", "/error", "/drop", "/cut", "/silent"} {
		req := s.Request("POST", path+"?key="+secret, strings.NewReader(`{"prompt":"`+secret+`"}`),
			"X-Api-Key", secret, "Cookie", "a="+secret, "Anthropic-Beta", secret, "X-Stainless-Timeout", secret, "X-Request-Id", secret)
		req.Header.Set("Authorization", "Bearer "+secret)
		s.Try(req) // some fail, as they should
	}
	for _, request := range []string{
		"POST /large?" + secret + " HTTP/1.1\r\nHost: " + secret + "\r\nContent-Length: 99999999\r\n\r\n",
		"POST /chunks?" + secret + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + secret + "\r\n",
		"CONNECT api.example.com:443 HTTP/1.1\r\nHost: " + secret + "\r\n\r\n",
		// By net/http these are refused, and so not counted.
		"GET /%zz" + secret + " HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: x\r\nbad header " + secret + "\r\n\r\n",
		secret + "\r\n\r\n",
	} {
		if a := s.Say(request).Answer(); a.StatusCode < 400 {
			s.Errorf("%q was answered with %d", request, a.StatusCode)
		}
	}
}
