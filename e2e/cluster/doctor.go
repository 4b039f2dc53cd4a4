package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// doctor runs the runbook's command in the pod. It returns all lines and the
// exit code.
func (w *world) doctor(ctx context.Context, p *pod) (lines string, code int, err error) {
	cmd := w.kube.command(ctx, "-n", name, "exec", "-c", "proxy", p.Name, "--", "/bin/anthropic-oauth-proxy", "-check")
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return string(out), exit.ExitCode(), nil
	}
	return string(out), 0, err
}

// doctorFails wants step to be the last line that a step of the doctor has, and exit code 1.
func (w *world) doctorFails(ctx context.Context, p *pod, step string) (string, error) {
	out, code, err := w.doctor(ctx, p)
	if err != nil {
		return "", err
	}
	var last string
	for line := range strings.Lines(out) {
		word, _, _ := strings.Cut(line, " ")
		switch word {
		case "config", "tailscaled", "dns", "tcp", "tls", "http":
			last = strings.TrimSpace(line)
		}
	}
	if code != 1 || !strings.HasPrefix(last, step+" ") {
		return "", fmt.Errorf("exit code %d and last step %q, not 1 and %s:\n%s", code, last, step, out)
	}
	return last, nil
}

func doctorPasses(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	out, code, err := w.doctor(ctx, p)
	if err == nil && (code != 0 || !strings.Contains(out, "\nhttp ")) {
		err = fmt.Errorf("exit code %d:\n%s", code, out)
	}
	return strings.ReplaceAll(strings.TrimSpace(out), "\n", "\n      "), err
}

// doctorUpstreamDown points the pod at a port where nobody listens any more.
func doctorUpstreamDown(ctx context.Context, w *world) (string, error) {
	gone, err := fakeanthropic.StartAt(net.JoinHostPort(w.host, "0"), fakeanthropic.HTTP2, nil)
	if err != nil {
		return "", err
	}
	if err := gone.Close(); err != nil {
		return "", err
	}
	o := w.overlay
	o.upstream = gone.URL
	p, err := w.redeploy(ctx, o)
	if err != nil {
		return "", err
	}
	measured, err := w.doctorFails(ctx, p, "tcp")
	return measured, w.healed(ctx, err)
}

// doctorWrongCA gives the pod the authority of another server.
func doctorWrongCA(ctx context.Context, w *world) (string, error) {
	other, err := fakeanthropic.Start(fakeanthropic.HTTP2, nil)
	if err != nil {
		return "", err
	}
	defer other.Close()
	authority, err := os.ReadFile(other.CAFile)
	if err != nil {
		return "", err
	}
	o := w.overlay
	o.authority = string(authority)
	p, err := w.redeploy(ctx, o)
	if err != nil {
		return "", err
	}
	measured, err := w.doctorFails(ctx, p, "tls")
	return measured, w.healed(ctx, err)
}
