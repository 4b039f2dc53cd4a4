package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestDoctor lets -check fail at each step, and pass.
func TestDoctor(t *testing.T) {
	t.Parallel()
	healthy := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Fail(http.StatusUnauthorized))
	hangUp := upstream(t, fakeanthropic.HTTP1, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	mute := rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) })
	noSocket := filepath.Join(t.TempDir(), "none.sock")
	tests := []struct {
		name     string
		tailnet  bool // without -local
		upstream string
		env      []string
		config   string
		steps    []string // that begin a line, in order
		fails    bool     // at the last one
		says     []string // on its line
	}{
		{name: "passes, whatever the status", upstream: healthy.URL, env: healthy.Env(), steps: []string{"config", "tailscaled", "dns", "tcp", "tls", "http"}, says: []string{"401"}},
		{name: "name unknown", upstream: "https://" + strings.Repeat("x", 64) + ".invalid", steps: []string{"config", "tailscaled", "dns"}, fails: true, says: []string{"no such host"}},
		{name: "port closed", upstream: "https://" + closedPort(t), steps: []string{"config", "tailscaled", "dns", "tcp"}, fails: true, says: []string{"refused"}},
		{name: "unknown authority", upstream: healthy.URL, steps: []string{"config", "tailscaled", "dns", "tcp", "tls"}, fails: true, says: []string{"certificate"}},
		{name: "handshake hangs", upstream: "https://" + mute, config: "proxy.connect_timeout_secs = 1", steps: []string{"config", "tailscaled", "dns", "tcp", "tls"}, fails: true},
		{name: "hangs up", upstream: hangUp.URL, env: hangUp.Env(), steps: []string{"config", "tailscaled", "dns", "tcp", "tls", "http"}, fails: true, says: []string{"EOF"}},
		{name: "no tailscaled", tailnet: true, upstream: healthy.URL, env: append(healthy.Env(), "TAILSCALE_SOCKET="+noSocket), steps: []string{"config", "tailscaled"}, fails: true, says: []string{noSocket}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := []string{"-check", "-upstream", tt.upstream}
			if !tt.tailnet {
				args = append(args, "-local")
			}
			r := proxytest.Exec(t, proxytest.Options{Args: args, Env: tt.env, Config: tt.config})
			t.Logf("\n%s", r.Stdout)
			if want := map[bool]int{false: 0, true: 1}[tt.fails]; r.Code != want {
				t.Errorf("exit code %d, want %d: %s", r.Code, want, r.Stderr)
			}
			lines := strings.Split(strings.TrimSpace(r.Stdout), "\n")
			if len(lines) != len(tt.steps) {
				t.Fatalf("%d lines, want %d: %v", len(lines), len(tt.steps), tt.steps)
			}
			for i, step := range tt.steps {
				if !strings.HasPrefix(lines[i], step) {
					t.Errorf("line %d is %q, want %s", i+1, lines[i], step)
				}
			}
			checkSays(t, "the last line", lines[len(lines)-1], tt.says...)
		})
	}
}
