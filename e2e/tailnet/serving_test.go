package tailnet_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

var uptime = regexp.MustCompile(`"uptime_seconds":\d+`)

// What /health answers but for the uptime.
const (
	healthy = `{"status":"healthy","tailnet":"connected","tailnet_hostname":"anthropic-oauth-proxy","tailnet_ip":"100.64.0.1",` +
		`"uptime_seconds":N,"requests_served":0,"errors_total":0}`
	degraded = `{"status":"degraded","tailnet":"not_connected","uptime_seconds":N,"requests_served":0,"errors_total":0}`
)

// logPrefix is how every line begins.
var logPrefix = regexp.MustCompile(`^\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"[A-Z]+","message":"`)

func TestStartupLogAndHealth(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")

	// The runbook's sequence, with the keys that it shows.
	want := []struct{ message, key, value string }{
		{"starting anthropic-oauth-proxy", "", ""},
		{"loading configuration", "path", p.ConfigFile},
		{"configuration loaded", "listen_addr", "127.0.0.1:0"},
		{"state: ConnectingTailnet", "", ""},
		{"state: Starting", "", ""},
		{proxytest.MsgRunning, "addr", p.Addr()},
	}
	next := 0
	for _, line := range p.Logs() {
		if !logPrefix.MatchString(line.Raw) {
			t.Errorf("log line %s does not begin with timestamp, level, message", line.Raw)
		}
		if next < len(want) && line.Message() == want[next].message {
			if got := line.Text(want[next].key); got != want[next].value {
				t.Errorf("%q has %s %q, want %q", line.Message(), want[next].key, got, want[next].value)
			}
			next++
		}
	}
	if next < len(want) {
		t.Errorf("the log lacks %q in its place:\n%s", want[next].message, p.Stdout())
	}
	if lines := troubles(p); len(lines) > 0 {
		t.Errorf("a clean start warns: %v", lines)
	}

	checkHealth(t, p, http.StatusOK, healthy)
	m := proxytest.Scrape(t, p)
	for _, gauge := range []string{"tailnet_connected", "tailnet_control_online"} {
		within(t, soon, gauge+" 1", func() bool {
			m = proxytest.Scrape(t, p)
			return m.Value(gauge) == 1
		})
	}
}

func TestRequestsBeforeTheFirstConnection(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.start(f.sidecar)
	p := f.launch("")
	f.do(p.WaitListening(proxytest.Timeout))

	checkHealth(t, p, http.StatusServiceUnavailable, degraded)
	if m := proxytest.Scrape(t, p); !m.Has("tailnet_connected") || m.Value("tailnet_connected") != 0 {
		t.Error("tailnet_connected is not 0")
	}
	resp := send(t, http.DefaultClient, p.URL(), message)
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Errorf("status %d, Retry-After %q; want 503 with Retry-After", resp.StatusCode, resp.Header.Get("Retry-After"))
	}
	if n := len(f.upstream.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests, want none", n)
	}

	f.do(f.sidecar.Up(f.ctx, ""))
	t.Logf("healthy %v after the login", follows(t, p, soon, true))
	if status, body := post(t, http.DefaultClient, p.URL()); status != http.StatusOK {
		t.Errorf("status %d: %s", status, body)
	}
}

func TestPostThroughWireGuard(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	node, c := f.client("laptop")

	status, body := post(t, c, f.tailnetURL(p),
		"Anthropic-Beta", "first-2025-01-01,second-2025-01-01", "Anthropic-Beta", "third-2025-01-01")
	if status != http.StatusOK || !strings.Contains(body, `"stop_reason":"end_turn"`) {
		t.Errorf("status %d: %s", status, body)
	}
	requests := f.upstream.Requests()
	if len(requests) != 1 {
		t.Fatalf("the upstream got %d requests, want 1", len(requests))
	}
	got := requests[0]
	betas := strings.ReplaceAll(strings.Join(got.Header.Values("Anthropic-Beta"), ","), " ", "")
	if want := "first-2025-01-01,second-2025-01-01,third-2025-01-01,oauth-2025-04-20"; betas != want {
		t.Errorf("anthropic-beta %q, want %q", betas, want)
	}
	if auth := got.Header.Get("Authorization"); auth != "Bearer test-token" {
		t.Errorf("authorization %q was changed", auth)
	}
	if string(got.Body) != message {
		t.Errorf("body %q, want %q", got.Body, message)
	}

	user, err := node.User(f.ctx)
	f.do(err)
	line := proxytest.WaitLog(t, p, proxytest.MsgRequestCompleted)
	checkCaller(t, line, "laptop", user)
}

// checkCaller checks who a request's log line says has called: "" for nobody.
func checkCaller(t *testing.T, line proxytest.Line, node, user string) {
	t.Helper()
	if got, _, _ := strings.Cut(line.Text("tailnet_node"), "."); got != node {
		t.Errorf("tailnet_node %q, want %q", line.Text("tailnet_node"), node)
	}
	if got := line.Text("tailnet_user"); got != user {
		t.Errorf("tailnet_user %q, want %q", got, user)
	}
}

func TestTaggedCaller(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("require_tailnet = true")
	_, c := f.client("runner", "tag:ci", "tag:build")

	if status, body := post(t, c, f.tailnetURL(p)); status != http.StatusOK {
		t.Fatalf("status %d: %s", status, body)
	}
	line := proxytest.WaitLog(t, p, proxytest.MsgRequestCompleted)
	if node, _, _ := strings.Cut(line.Text("tailnet_node"), "."); node != "runner" {
		t.Errorf("tailnet_node %q, want runner", line.Text("tailnet_node"))
	}
	if strings.Contains(line.Raw, "@") { // as in every login name
		t.Errorf("the line names a user, but a tagged node has none: %s", line.Raw)
	}
	for _, tag := range []string{"tag:ci", "tag:build"} {
		if !strings.Contains(line.Raw, tag) {
			t.Errorf("the line does not have %s: %s", tag, line.Raw)
		}
	}
}

func TestStreamThroughWireGuard(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	upstream := make(steps)
	f.upstream.Handle(upstream)
	p := f.running("")
	_, c := f.client("laptop")

	resp := send(t, c, f.tailnetURL(p), message)
	defer resp.Body.Close()
	// The upstream sends an event only once the one before has been read here:
	// if anything on the way waited for more, nothing would arrive at all.
	const events = 60
	body := bufio.NewReader(resp.Body)
	start := time.Now()
	for i := range events {
		if got := readEvent(t, body); got != event(i) {
			t.Fatalf("event %d is %q, want %q", i, got, event(i))
		}
		if i < events-1 {
			upstream <- struct{}{}
		}
	}
	close(upstream)
	t.Logf("%d events, one by one, took %v", events, time.Since(start))
	if rest, err := io.ReadAll(body); err != nil || len(rest) > 0 {
		t.Errorf("after the stream came %q, %v; want its clean end", rest, err)
	}
	line := proxytest.WaitLog(t, p, proxytest.MsgRequestCompleted)
	if line.Number("status") != http.StatusOK || line.Text("error") != "" {
		t.Errorf("the stream was logged as %s", line.Raw)
	}
}

// TestVanishedClient: a laptop's lid is closed. The sidecar acknowledges for it what the proxy sends, and has to notice.
func TestVanishedClient(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.upstream.Handle(fakeanthropic.Silent())
	p := f.running("timeout_secs = 600")
	node, c := f.client("laptop")
	f.inBackground(func(ctx context.Context) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, f.tailnetURL(p)+"/v1/messages", strings.NewReader(message))
		if err != nil {
			t.Error(err)
		} else if resp, err := c.Do(req); err == nil {
			resp.Body.Close()
		}
	})
	within(t, soon, "the request is at the upstream", func() bool { return len(f.upstream.Requests()) == 1 })
	f.do(node.Stop())
	start := time.Now()
	line, err := p.WaitLine("the request's end", 2*time.Minute, func(l proxytest.Line) bool { return l.Message() == proxytest.MsgRequestCompleted })
	f.do(err)
	t.Logf("noticed after %v", time.Since(start))
	if line.Number("status") != 499 {
		t.Errorf("%s, want status 499", line.Raw)
	}
	if took := time.Since(start); took > 75*time.Second {
		t.Errorf("noticed after %v, want a minute", took)
	}
}

func TestOnlyTailnetCallersWithRequireTailnet(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("require_tailnet = true")
	_, c := f.client("laptop")

	// What serve and other proxies tell about callers is easily forged.
	resp := send(t, http.DefaultClient, p.URL(), message,
		"Tailscale-User-Login", "admin@example.com", "X-Forwarded-For", "100.64.0.2", "Forwarded", "for=100.64.0.2")
	defer resp.Body.Close()
	var refusal struct {
		Type  string `json:"type"`
		Error struct {
			Type, Message string
		} `json:"error"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&refusal); err != nil {
		t.Errorf("the refusal is no JSON: %v", err)
	}
	if resp.StatusCode != http.StatusForbidden || refusal.Type != "error" || refusal.Error.Message == "" {
		t.Errorf("from outside: status %d, body %+v; want 403 with an error", resp.StatusCode, refusal)
	}
	if n := len(f.upstream.Requests()); n != 0 {
		t.Errorf("the upstream got %d requests from outside, want none", n)
	}
	if status, body := post(t, c, f.tailnetURL(p)); status != http.StatusOK {
		t.Errorf("from the tailnet: status %d: %s", status, body)
	}
	checkHealthAnswersAnyone(t, p)
}

// checkHealthAnswersAnyone checks that probes and scrapes, which come from
// outside the tailnet, are let in.
func checkHealthAnswersAnyone(t *testing.T, p *proxytest.Proxy) {
	t.Helper()
	for _, path := range []string{"/health", "/livez", "/metrics"} {
		resp, err := http.Get(p.URL() + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("GET %s from outside: status %d, want 200", path, resp.StatusCode)
		}
	}
}

func TestAnyCallerWithoutRequireTailnet(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	if status, body := post(t, http.DefaultClient, p.URL(), "Tailscale-User-Login", "admin@example.com"); status != http.StatusOK {
		t.Errorf("status %d: %s", status, body)
	}
	checkCaller(t, proxytest.WaitLog(t, p, proxytest.MsgRequestCompleted), "", "")
	if got := f.upstream.Requests()[0].Header; got.Get("Tailscale-User-Login") != "" {
		t.Error("a forged identity header reached the upstream")
	}
}

func TestAnotherHostnameIsWarnedAboutAndUsed(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.sidecar.Name = "another-name"
	p := f.running("")
	checkHealth(t, p, http.StatusOK, strings.Replace(healthy, hostname, "another-name", 1))
	lines := troubles(p)
	if len(lines) != 1 || lines[0].Text("level") != "WARN" || !strings.Contains(lines[0].Raw, "another-name") {
		t.Errorf("warnings %v, want one that names another-name", lines)
	}
}

func TestARenamedNodeIsFollowed(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	f.do(f.tailnet.Control.SetHostname(f.ctx, f.sidecar, hostname+"-1"))
	took := within(t, 30*time.Second, "the new name in /health", func() bool {
		_, body, err := p.Health()
		f.do(err)
		return strings.Contains(string(body), `"tailnet_hostname":"anthropic-oauth-proxy-1"`)
	})
	t.Logf("/health had the new name after %v", took)
	proxytest.WaitLog(t, p, "this node has another name than tailscale.hostname says; clients reach it under its actual name")
	if lines := troubles(p); len(lines) != 1 {
		t.Errorf("warnings %v, want one about the name", lines)
	}
}
