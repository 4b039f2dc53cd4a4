package tailnet_test

import (
	"slices"
	"strings"
	"testing"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestCheck asks the doctor about tailnets in all states.
func TestCheck(t *testing.T) {
	t.Parallel()
	healthyAll := []string{"config", "tailscaled", "dns", "tcp", "tls", "http"}
	upToTailscaled := healthyAll[:2]
	for _, tt := range []struct {
		name    string
		options tailnet.Options
		before  func(*fixture)
		code    int
		steps   []string // the first words of the lines
		last    string   // part of the line about tailscaled
	}{
		{
			name:   "connected",
			before: func(f *fixture) { f.connect(f.sidecar) },
			code:   0, steps: healthyAll, last: "Running as anthropic-oauth-proxy (100.64.0.1)",
		},
		{
			name:   "no socket",
			before: nothing,
			code:   1, steps: upToTailscaled, last: "no such file",
		},
		{
			name: "dead socket",
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.do(f.sidecar.Kill())
			},
			code: 1, steps: upToTailscaled, last: "refused",
		},
		{
			name: "hung daemon",
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.do(f.sidecar.Stop())
			},
			code: 1, steps: upToTailscaled, last: "does not answer",
		},
		{
			name: "tailscale down",
			before: func(f *fixture) {
				f.connect(f.sidecar)
				f.do(f.sidecar.Down(f.ctx))
			},
			code: 1, steps: upToTailscaled, last: "TailnetNotRunning",
		},
		{
			name:    "wrong auth key",
			options: tailnet.Options{AuthKey: rightKey},
			before: func(f *fixture) {
				f.start(f.sidecar)
				if err := f.sidecar.Up(f.ctx, wrongKey); err == nil {
					f.t.Fatal("the wrong key was accepted")
				}
			},
			code: 1, steps: upToTailscaled, last: "TailnetAuth",
		},
		{
			name:    "machine approval pending",
			options: tailnet.Options{ApproveMachines: true},
			before: func(f *fixture) {
				f.start(f.sidecar)
				f.login("")
				f.await(ipn.NeedsMachineAuth)
			},
			code: 1, steps: upToTailscaled, last: "TailnetMachineAuth",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tt.options)
			tt.before(f)
			got := proxytest.Exec(t, proxytest.Options{Args: []string{"-check"}, Config: f.config(""), Env: f.upstream.Env()})

			lines := strings.Split(strings.TrimSpace(got.Stdout), "\n")
			var steps []string
			for _, line := range lines {
				step, _, _ := strings.Cut(line, " ")
				steps = append(steps, step)
			}
			if got.Code != tt.code || !slices.Equal(steps, tt.steps) {
				t.Fatalf("exit code %d, steps %v; want %d, %v\n%s%s", got.Code, steps, tt.code, tt.steps, got.Stdout, got.Stderr)
			}
			if !strings.Contains(lines[1], tt.last) {
				t.Errorf("%s\nwant %q in it", lines[1], tt.last)
			}
			t.Log(lines[1])
		})
	}
}
