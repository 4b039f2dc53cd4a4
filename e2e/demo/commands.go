package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// command is something to type.
type command struct {
	title string
	shell string
	shows string // part of what it prints when all is well
}

// commands are what to type.
func (s *scene) commands() []command {
	return []command{{
		title: "Ask through the tailnet, as a program on the laptop does. The answer streams:",
		shell: fmt.Sprintf(`curl -sSN --proxy socks5h://%s http://%s:%s/v1/messages \
  -H 'authorization: Bearer demo-token' -H 'content-type: application/json' \
  -d '{"model":"claude-fake-1","max_tokens":64,"stream":true,"messages":[{"role":"user","content":"Hello"}]}'`,
			s.laptop.SOCKSAddr(), hostname, s.port()),
		shows: "event: message_stop",
	}, {
		title: "Is the proxy well?",
		shell: fmt.Sprintf("curl -sS http://127.0.0.1:%s/health", s.port()),
		shows: `"status":"healthy"`,
	}, {
		title: "What has it done?",
		shell: fmt.Sprintf("curl -sS http://127.0.0.1:%s/metrics | grep -E '^(proxy_requests|tailnet)_'", s.port()),
		shows: "tailnet_connected 1",
	}}
}

// introduce tells what runs and what to type.
func (s *scene) introduce(w io.Writer) {
	fmt.Fprintf(w, "\nRunning on this machine: a tailnet with the nodes %q and %q, the proxy on the\n"+
		"first, and a fake Anthropic API behind it. In another terminal:\n", hostname, "laptop")
	for _, c := range s.commands() {
		fmt.Fprintf(w, "\n# %s\n%s\n", c.title, c.shell)
	}
	fmt.Fprint(w, "\nThe proxy's log follows; see who called in tailnet_node and tailnet_user.\n"+
		"Ctrl-C ends and removes everything.\n\n")
}

// follow prints the proxy's log until ctx ends. The proxy is not to end before.
func (s *scene) follow(ctx context.Context, w io.Writer) error {
	for printed := 0; ; {
		lines := s.proxy.Logs()
		for _, line := range lines[printed:] {
			fmt.Fprintln(w, line.Raw)
		}
		printed = len(lines)
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil
		case <-s.proxy.Done():
			return s.ended(ctx)
		}
	}
}

// ended tells a Ctrl-C, which the proxy gets too and may heed first, from a
// proxy that ended for a reason of its own.
func (s *scene) ended(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-time.After(time.Second):
		return fmt.Errorf("the proxy ended: %s", s.proxy.Stderr())
	}
}

// runCommands types the commands itself and shows what they print.
func (s *scene) runCommands(ctx context.Context, w io.Writer) error {
	for _, c := range s.commands() {
		fmt.Fprintf(w, "\n# %s\n%s\n\n", c.title, c.shell)
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, "sh", "-c", c.shell)
		cmd.Stdout, cmd.Stderr = io.MultiWriter(w, &out), io.MultiWriter(w, &out)
		err := cmd.Run()
		fmt.Fprintln(w)
		if err != nil {
			return fmt.Errorf("the command failed (is curl installed?): %w", err)
		}
		if !strings.Contains(out.String(), c.shows) {
			return fmt.Errorf("the command did not print %q", c.shows)
		}
	}
	line, err := s.proxy.WaitLog(proxytest.MsgRequestCompleted, proxytest.Timeout)
	if err != nil {
		return err
	}
	fmt.Fprintf(w, "\n# The proxy's log tells who asked:\n%s\n", line.Raw)
	return nil
}
