// Demo runs the proxy on a tailnet that lives on this machine alone: a control server, a tailscaled beside the proxy and one on a
// second node, the "laptop", and a fake Anthropic API. It prints what to type.
//
//	go -C e2e run ./demo          runs until Ctrl-C
//	go -C e2e run ./demo -once    runs the printed commands itself and ends
//
// It needs Go and curl, no account, no key and no network. The first run builds tailscale, which takes some minutes.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func main() {
	once := flag.Bool("once", false, "run the printed commands, show what they print, and end")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log.SetOutput(io.Discard) // the test control server and the STUN server talk there
	if err := run(ctx, *once, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run is the demo's life. The end of ctx is its ordinary end.
func run(ctx context.Context, once bool, stdout, progress io.Writer) (err error) {
	s := &scene{}
	defer func() { err = errors.Join(err, s.close()) }()
	switch err := s.start(ctx, progress); {
	case ctx.Err() != nil:
		return nil // Ctrl-C while it was starting
	case err != nil:
		return err
	case once:
		return s.runCommands(ctx, stdout)
	}
	s.introduce(stdout)
	return s.follow(ctx, stdout)
}

// command is something to type.
type command struct {
	title, shell string
	shows        string // part of what it prints when all is well
}

func (s *scene) commands() []command {
	_, port, _ := strings.Cut(s.proxy.Addr(), ":") // the same at 127.0.0.1 and in the tailnet
	return []command{
		{"Ask through the tailnet, as a program on the laptop does. The answer streams:", fmt.Sprintf(`curl -sSN --proxy socks5h://%s http://%s:%s/v1/messages \
  -H 'authorization: Bearer demo-token' -H 'content-type: application/json' \
  -d '{"model":"claude-fake-1","max_tokens":64,"stream":true,"messages":[{"role":"user","content":"Hello"}]}'`,
			s.laptop.SOCKSAddr(), hostname, port), "event: message_stop"},
		{"Is the proxy well?", "curl -sS " + s.proxy.URL() + "/health", `"status":"healthy"`},
		{"What has it done?", "curl -sS " + s.proxy.URL() + "/metrics | grep -E '^(proxy_requests|tailnet)_'", "tailnet_connected 1"},
	}
}

// introduce tells what runs and what to type.
func (s *scene) introduce(w io.Writer) {
	fmt.Fprintf(w, `
Running on this machine: a tailnet with the nodes %q and "laptop", the proxy on the
first, and a fake Anthropic API behind it. In another terminal:
`, hostname)
	for _, c := range s.commands() {
		fmt.Fprintf(w, "\n# %s\n%s\n", c.title, c.shell)
	}
	fmt.Fprint(w, `
The proxy's log follows; see who called in tailnet_node and tailnet_user.
Ctrl-C ends and removes everything.

`)
}

// follow prints the proxy's log until ctx ends. The proxy is not to end before, but it gets Ctrl-C too, and may heed it first.
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
			if time.Sleep(time.Second); ctx.Err() == nil {
				return fmt.Errorf("the proxy ended: %s", s.proxy.Stderr())
			}
			return nil
		}
	}
}

// runCommands types the commands itself and shows what they print.
func (s *scene) runCommands(ctx context.Context, w io.Writer) error {
	for _, c := range s.commands() {
		fmt.Fprintf(w, "\n# %s\n%s\n\n", c.title, c.shell)
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, "sh", "-c", c.shell)
		cmd.Stdout = io.MultiWriter(w, &out)
		cmd.Stderr = cmd.Stdout
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("the command failed (is curl installed?): %w", err)
		}
		fmt.Fprintln(w)
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
