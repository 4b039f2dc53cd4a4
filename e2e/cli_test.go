package e2e

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// checkSays checks that a text contains everything that it should.
func checkSays(t *testing.T, what, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("%s lacks %q:\n%s", what, w, text)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, flag := range []string{"-h", "-help", "--help"} {
		r := proxytest.Exec(t, proxytest.Options{Args: []string{flag}})
		if r.Code != 0 || r.Stderr != "" {
			t.Errorf("%s: exit code %d, stderr %q", flag, r.Code, r.Stderr)
		}
		checkSays(t, flag, r.Stdout, "-config", "-listen", "-upstream", "-local", "-check-config", "-check", "-version",
			"CONFIG_PATH", "LOG_LEVEL", "TAILSCALE_SOCKET", "/etc/anthropic-oauth-proxy/config.toml",
			"/var/run/tailscale/tailscaled.sock", "https://api.anthropic.com", "127.0.0.1:8080")
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	r := proxytest.Exec(t, proxytest.Options{Args: []string{"-version"}})
	if r.Code != 0 || r.Stderr != "" || !regexp.MustCompile(`\d+\.\d+\.\d+.*go1\.\d+`).MatchString(r.Stdout) {
		t.Errorf("exit code %d, stdout %q, stderr %q", r.Code, r.Stdout, r.Stderr)
	}
}

// TestRefusals covers command lines and configurations that can't be carried out:
// exit code 2, and a message that says what is wrong, where, and what to do.
func TestRefusals(t *testing.T) {
	t.Parallel()
	missing := filepath.Join(t.TempDir(), "missing.toml")
	tests := []struct {
		name   string
		args   []string
		env    []string
		config string
		says   []string // FILE stands for the config file
	}{
		{name: "stray argument", args: []string{"serve"}, says: []string{`"serve"`, "-h"}},
		{name: "unknown flag", args: []string{"-lokal"}, says: []string{"-lokal", "-h"}},
		{name: "flag without value", args: []string{"-listen"}, says: []string{"-listen"}},
		{name: "named file missing", args: []string{"-config", missing}, says: []string{missing, "no such file", "-config"}},
		{name: "file named by the environment missing", env: []string{"CONFIG_PATH=" + missing}, says: []string{missing, "no such file", "CONFIG_PATH"}},
		{name: "file is a folder", args: []string{"-config", os.TempDir()}, says: []string{os.TempDir(), "is a directory"}},
		{name: "typo in a key", config: "[proxy]\ntimeout_sec = 5", says: []string{"FILE:2:1: ", "unknown key", "timeout_sec", "did you mean", "timeout_secs"}},
		{name: "typo in a table", config: "[proxi]\ntimeout_secs = 5", says: []string{"FILE:1:", "unknown key", "did you mean", "proxy"}},
		{
			name: "two errors", config: "[proxy]\ntimeout_secs = \"x\"\nmax_connections = 0",
			says: []string{"FILE:2:16: ", "timeout_secs", "FILE:3:19: ", "max_connections"},
		},
		{
			name: "two syntax errors", config: "[proxy]\ntimeout_secs = = 5\n\nmax_connections = 01\n",
			says: []string{"FILE:2:16: ", "FILE:4:19: "},
		},
		{name: "syntax and meaning", config: "[proxy]\ntimeout_secs = [1\nmax_boddy_mb = 3\n", says: []string{"FILE:"}},
		{name: "unsupported", config: "proxy.timeout_secs = 2020-01-01", says: []string{"FILE:1:22: ", "unsupported"}},
		{name: "out of range", config: "proxy.timeout_secs = 3601", says: []string{"FILE:1:22: ", "1", "3600"}},
		{name: "upstream with a query", args: []string{"-local", "-upstream", "https://x.example/?a=b"}, says: []string{"query"}},
		{name: "upstream without a scheme", args: []string{"-local", "-upstream", "api.example.com"}, says: []string{"http"}},
		{name: "upstream with a password", config: `proxy.upstream_url = "https://a:s3cret@x.example"`, says: []string{"FILE:1:22: "}},
		{name: "injected authorization", config: "[[headers]]\nname = \"Authorization\"\nvalue = \"x\"", says: []string{"FILE:", "uthorization"}},
		{name: "malformed listen address", args: []string{"-local", "-listen", "8080"}, says: []string{`"8080"`, "HOST:PORT"}},
		{name: "require_tailnet with -local", args: []string{"-local"}, config: "proxy.require_tailnet = true", says: []string{"require_tailnet", "-local"}},
		{name: "under -check too", args: []string{"-check"}, config: "proxy.timeout_secs = 0", says: []string{"FILE:1:22: "}},
		{name: "under -check-config too", args: []string{"-check-config"}, config: "proxy.timeout_secs = 0", says: []string{"FILE:1:22: "}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := proxytest.Launch(t, proxytest.Options{Args: tt.args, Env: tt.env, Config: tt.config})
			code, err := p.Wait(proxytest.Timeout)
			if err != nil {
				t.Fatal(err)
			}
			if code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			for i, w := range tt.says {
				tt.says[i] = strings.ReplaceAll(w, "FILE", p.ConfigFile)
			}
			checkSays(t, "the message", p.Stderr(), tt.says...)
			if strings.Contains(p.Stdout()+p.Stderr(), "s3cret") {
				t.Error("the message shows a password")
			}
		})
	}
}

// TestBusyPort shows that a port in use ends the start at once.
func TestBusyPort(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	addr := listener.Addr().String()
	r := proxytest.Exec(t, proxytest.Options{Args: []string{"-local", "-listen", addr}})
	if r.Code != 1 {
		t.Errorf("exit code %d, want 1", r.Code)
	}
	checkSays(t, "the message", r.Stdout+r.Stderr, addr, "in use", "-listen")
}

// TestPrecedence shows that flags win over the environment, and that over the
// file.
func TestPrecedence(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	other := filepath.Join(dir, "other.toml")
	if err := os.WriteFile(other, []byte("proxy.timeout_secs = 7\nproxy.listen_addr = \"127.0.0.1:7\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := "[tailscale]\nsocket = \"/file.sock\"\n[proxy]\nlisten_addr = \"127.0.0.1:1\"\nupstream_url = \"https://file.example\"\n"
	tests := []struct {
		name   string
		args   []string
		env    []string
		config string
		want   []string
	}{
		{
			name: "defaults", want: []string{
				`hostname = "anthropic-oauth-proxy"`, `socket = "/var/run/tailscale/tailscaled.sock"`, `listen_addr = "0.0.0.0:8080"`,
				`upstream_url = "https://api.anthropic.com"`, "timeout_secs = 60", "timeout_retries = 2", "honor_client_timeout = true",
				"connect_timeout_secs = 5", "max_connections = 1000", "max_body_mb = 10", "body_memory_mb = 48", "drain_timeout_secs = 5",
				"require_tailnet = false", `"anthropic-beta"`, `"oauth-2025-04-20"`,
			},
		},
		{name: "file", config: file, want: []string{`"/file.sock"`, `"127.0.0.1:1"`, `"https://file.example"`}},
		{name: "environment over file", config: file, env: []string{"TAILSCALE_SOCKET=/env.sock"}, want: []string{`"/env.sock"`, `"127.0.0.1:1"`}},
		{
			name: "flags over file", config: file, args: []string{"-listen", "127.0.0.1:2", "-upstream", "https://flag.example"},
			want: []string{`"127.0.0.1:2"`, `"https://flag.example"`},
		},
		{name: "-config over CONFIG_PATH", config: file, env: []string{"CONFIG_PATH=" + other}, want: []string{"timeout_secs = 60", `"127.0.0.1:1"`}},
		{name: "CONFIG_PATH", env: []string{"CONFIG_PATH=" + other}, want: []string{"timeout_secs = 7", `"127.0.0.1:7"`}},
		{name: "-local over the file's address", config: file, args: []string{"-local"}, want: []string{`"127.0.0.1:8080"`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r := proxytest.Exec(t, proxytest.Options{Args: append(tt.args, "-check-config"), Env: tt.env, Config: tt.config})
			if r.Code != 0 || r.Stderr != "" {
				t.Errorf("exit code %d, stderr %q", r.Code, r.Stderr)
			}
			checkSays(t, "the effective configuration", r.Stdout, tt.want...)
		})
	}
}

// TestCheckConfigRoundTrip shows that what -check-config prints is a
// configuration that says the same.
func TestCheckConfigRoundTrip(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]string{
		"defaults": "# nothing\n",
		"everything": `
[tailscale]
hostname = "claude"
socket = '/run/odd "name"\.sock'
[proxy]
listen_addr = "[::]:9090"
upstream_url = "https://gateway.example/a%2Fb"
timeout_secs = 30
timeout_retries = 0
honor_client_timeout = false
connect_timeout_secs = 300
max_connections = 100_000
max_body_mb = 1024
body_memory_mb = 65536
drain_timeout_secs = 0
require_tailnet = true
[[headers]]
name = "x-quoted"
value = "a \"b\" \\ \u00e9"
[[headers]]
name = "anthropic-beta"
value = "a,b"
`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Config: config})
			if first.Code != 0 || first.Stderr != "" {
				t.Fatalf("exit code %d, stderr %s", first.Code, first.Stderr)
			}
			second := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Config: first.Stdout})
			if second.Code != 0 || second.Stdout != first.Stdout {
				t.Errorf("read back, exit code %d, %s\n%s\ninstead of\n%s", second.Code, second.Stderr, second.Stdout, first.Stdout)
			}
		})
	}
}

// TestPredecessorsFile shows that files written for the program's predecessor
// load, with a warning about what is of no use any more.
func TestPredecessorsFile(t *testing.T) {
	t.Parallel()
	r := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Config: `
[tailscale]
hostname = "anthropic-oauth-proxy"
state_dir = "/var/lib/tailscale"
auth_key_file = "/etc/tailscale/authkey"
[proxy]
listen_addr = "0.0.0.0:8080"
upstream_url = "https://api.anthropic.com"
timeout_secs = 60
max_connections = 1000
[[headers]]
name = "anthropic-beta"
value = "oauth-2025-04-20"
`})
	if r.Code != 0 {
		t.Errorf("exit code %d", r.Code)
	}
	checkSays(t, "the warning", r.Stderr, "state_dir", "auth_key_file", "tailscaled")
}

// TestPlaintextUpstreamWarning shows that tokens do not travel in clear text
// unnoticed.
func TestPlaintextUpstreamWarning(t *testing.T) {
	t.Parallel()
	for upstream, warned := range map[string]bool{
		"http://api.example.com": true, "https://api.example.com": false, "http://127.0.0.1:9": false, "http://[::1]:9": false, "http://localhost:9": false,
	} {
		r := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config", "-upstream", upstream}})
		if r.Code != 0 || strings.Contains(r.Stderr, "clear") != warned {
			t.Errorf("%s: exit code %d, stderr %q; warned should be %v", upstream, r.Code, r.Stderr, warned)
		}
	}
}

// TestTerminal: who tries it out by hand reads at once where it listens, and what to type. Pipes get what they are promised, and no more (TestStartLog).
func TestTerminal(t *testing.T) {
	t.Parallel()
	binary, err := proxytest.Build()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), proxytest.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "script", "-qec", binary+" -local -listen 127.0.0.1:0", "/dev/null") // util-linux's: a terminal
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	lines := bufio.NewScanner(out)
	for range 3 {
		if lines.Scan() && strings.Contains(lines.Text(), "it listens on 127.0.0.1:0; in another terminal, type ANTHROPIC_BASE_URL=http://127.0.0.1:0 claude") {
			return
		}
	}
	t.Error("the first three lines do not say it")
}
