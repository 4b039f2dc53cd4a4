//go:build qemu

// Package arm64 runs the program for arm64, under qemu's user mode emulation.
package arm64

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

const qemu = "qemu-aarch64-static" // Debian's package qemu-user-static

// patience is for a machine that is emulated.
const patience = time.Minute

// emulated builds the program and returns a script that runs it.
func emulated(t *testing.T) string {
	t.Helper()
	interpreter, err := exec.LookPath(qemu)
	if err != nil {
		t.Fatalf("%v: install qemu-user-static", err)
	}
	dir := t.TempDir()
	build := exec.Command("go", "build", "-C", "../..", "-trimpath", "-ldflags", "-s -w", "-tags", proxytest.Tags, "-o", filepath.Join(dir, "proxy"), ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=arm64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building for arm64: %v\n%s", err, out)
	}
	script := filepath.Join(dir, "emulated")
	proxytest.Check(t, os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nexec %s %s/proxy \"$@\"\n", interpreter, dir), 0o755))
	return script
}

func TestARM64(t *testing.T) {
	binary := emulated(t)
	for flag, want := range map[string]string{"-version": "anthropic-oauth-proxy ", "-check-config": `upstream_url = "https://api.anthropic.com"`} {
		if out, err := exec.Command(binary, flag).Output(); err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s; want %q in it", flag, err, out, want)
		}
	}

	upstream := proxytest.Must(fakeanthropic.Start(fakeanthropic.HTTP2, nil))(t)
	defer upstream.Close()
	p := proxytest.Launch(t, proxytest.Options{Binary: binary, Args: []string{"-local", "-listen", "127.0.0.1:0", "-upstream", upstream.URL}, Env: upstream.Env()})
	proxytest.Check(t, p.WaitRunning(patience))
	for _, body := range []string{`{"model":"claude-fake-1","max_tokens":16,"messages":[{"role":"user","content":"hi"}]}`,
		`{"model":"claude-fake-1","max_tokens":16,"stream":true,"messages":[{"role":"user","content":"hi"}]}`} {
		req := proxytest.Must(http.NewRequestWithContext(t.Context(), http.MethodPost, p.URL()+"/v1/messages", strings.NewReader(body)))(t)
		req.Header.Set("Authorization", "Bearer test-token")
		resp := proxytest.Must(http.DefaultClient.Do(req))(t)
		answer, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(answer), "end_turn") {
			t.Errorf("%s: %s, %v, %s", body, resp.Status, err, answer)
		}
	}
	if m := proxytest.Scrape(t, p); m.Value("proxy_requests_total", "status", "200", "method", "POST") != 2 {
		t.Error("the metrics do not have the two requests")
	}
	start := time.Now()
	proxytest.Check(t, p.Signal(syscall.SIGTERM))
	if code, err := p.Wait(patience); err != nil || code != 0 {
		t.Errorf("exit code %d, %v", code, err)
	}
	proxytest.WaitLog(t, p, proxytest.MsgShutdownComplete)
	t.Logf("ended %v after SIGTERM", time.Since(start))
}
