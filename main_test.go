package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"testing"
	"time"
)

// env returns a getenv of the given NAME=VALUE pairs.
func env(pairs ...string) func(string) string {
	return func(name string) string {
		for _, pair := range pairs {
			if key, value, _ := strings.Cut(pair, "="); key == name {
				return value
			}
		}
		return ""
	}
}

func TestParseArgs(t *testing.T) {
	for _, row := range []struct {
		name string
		args []string
		env  []string
		want options
		err  string // in the error
	}{
		{name: "nothing"},
		{name: "everything", args: []string{"-config", "c", "-listen", "l", "-upstream", "u", "-local", "-check-config", "-check", "-version"},
			want: options{overrides: overrides{path: "c", listen: "l", upstream: "u", local: true}, checkConfig: true, check: true, version: true}},
		{name: "two hyphens and equals signs", args: []string{"--config=c", "--local=false"}, want: options{overrides: overrides{path: "c"}}},
		{name: "environment", env: []string{"CONFIG_PATH=e", "TAILSCALE_SOCKET=/s", "LOG_LEVEL=debug"}, want: options{overrides: overrides{path: "e", socket: "/s"}, logLevel: "debug"}},
		{name: "flag over environment", args: []string{"-config", "c"}, env: []string{"CONFIG_PATH=e"}, want: options{overrides: overrides{path: "c"}}},
		{name: "unknown flag", args: []string{"-nope"}, err: "anthropic-oauth-proxy: flag provided but not defined: -nope; -h lists what there is"},
		{name: "missing value", args: []string{"-listen"}, err: "flag needs an argument: -listen"},
		{name: "bad value", args: []string{"-local=maybe"}, err: "invalid boolean value"},
		{name: "stray argument", args: []string{"-local", "serve"}, err: `unexpected argument "serve"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			var stdout bytes.Buffer
			got, err := parseArgs(row.args, env(row.env...), &stdout)
			switch {
			case row.err == "" && (err != nil || *got != row.want):
				t.Errorf("%+v, %v; want %+v", got, err, row.want)
			case row.err != "" && (!strings.Contains(errorText(err), row.err) || exitCode(err) != 2):
				t.Errorf("the error is %v (exit code %d), want 2 and %q", err, exitCode(err), row.err)
			}
			if stdout.Len() > 0 {
				t.Errorf("it printed %s", &stdout)
			}
		})
	}
}

func TestExitCode(t *testing.T) {
	for _, row := range []struct {
		err  error
		want int
	}{
		{nil, 0}, {errFailed, 1}, {errors.New("x"), 1}, {usageError{errors.New("x")}, 2}, {configError{"x"}, 2},
		{fmt.Errorf("wrapped: %w", usageError{errors.New("x")}), 2}, {flag.ErrHelp, 1},
	} {
		if got := exitCode(row.err); got != row.want {
			t.Errorf("exitCode(%v) = %d, want %d", row.err, got, row.want)
		}
	}
}

// TestRun covers what ends by itself.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	bad, warned := filepath.Join(dir, "bad.toml"), filepath.Join(dir, "warned.toml")
	for path, text := range map[string]string{bad: "[proxy]\ntimeout_secs = 0\nmax_connections = 0\n", warned: "tailscale.state_dir = 'x'"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	problems := bad + ":2:16: proxy.timeout_secs must be a whole number from 1 to 3600\n" + bad + ":3:19: proxy.max_connections must be a whole number from 1 to 100000\n"
	for _, row := range []struct {
		name           string
		args, env      []string
		code           int
		stdout, stderr string // "…" at an end: only the rest counts
	}{
		{name: "help", args: []string{"-h"}, stdout: usage},
		{name: "help beside others", args: []string{"-local", "--help", "-nope"}, stdout: usage},
		{name: "version", args: []string{"-version"}, stdout: "anthropic-oauth-proxy " + version + ", revision " + buildRevision() + ", " + runtime.Version() + "\n"},
		{name: "bad flag", args: []string{"-nope"}, code: 2, stderr: "anthropic-oauth-proxy: flag provided but not defined: -nope; -h lists what there is\n"},
		{name: "stray argument under -check", args: []string{"-check", "x"}, code: 2, stderr: "anthropic-oauth-proxy: unexpected argument \"x\"; -h lists what there is\n"},
		{name: "-check-config", args: []string{"-check-config", "-config", warned, "-listen", ":1"}, stdout: testConfig(t, "", overrides{listen: ":1"}).toml(),
			stderr: "warning: " + warned + ":1:11: tailscale.state_dir is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line\n"},
		{name: "-check-config of a bad file", args: []string{"-check-config", "-config", bad}, code: 2, stderr: problems},
		{name: "-check of a bad file", args: []string{"-check"}, env: []string{"CONFIG_PATH=" + bad}, code: 2, stderr: problems},
		{name: "bad file", args: []string{"-config", bad}, code: 2, stdout: `…"error":"` + bad + `:3:19: proxy.max_connections must be a whole number from 1 to 100000"}` + "\n", stderr: problems},
		{name: "port in use", args: []string{"-local", "-listen", busy.Addr().String()}, code: 1, stdout: "…address already in use\"}\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			err := run(t.Context(), row.args, env(row.env...), &stdout, &stderr)
			if exitCode(err) != row.code {
				t.Errorf("exit code %d (%v), want %d", exitCode(err), err, row.code)
			}
			for name, pair := range map[string][2]string{"stdout": {stdout.String(), row.stdout}, "stderr": {stderr.String(), row.stderr}} {
				rest, partly := strings.CutPrefix(pair[1], "…")
				if partly && !strings.HasSuffix(pair[0], rest) || !partly && pair[0] != pair[1] {
					t.Errorf("%s is\n%swant\n%s", name, pair[0], pair[1])
				}
			}
		})
	}
}

// TestRunServes starts and stops the program on a real port.
func TestRunServes(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stdout logRecorder
	var stderr bytes.Buffer
	ended := make(chan error, 1)
	go func() {
		ended <- run(ctx, []string{"-local", "-listen", "127.0.0.1:0"}, env("LOG_LEVEL=loud"), &stdout, &stderr)
	}()
	for deadline := time.Now().Add(30 * time.Second); len(stdout.lines(t, "state: Running — accepting requests")) == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not run after 30 s")
		}
	}
	stop()
	if err := <-ended; err != nil || stderr.Len() > 0 {
		t.Errorf("it ended with %v, and wrote to stderr: %s", err, &stderr)
	}
	var messages []string
	for _, line := range stdout.lines(t) {
		messages = append(messages, line["message"].(string))
	}
	want := "starting anthropic-oauth-proxy|LOG_LEVEL is not one of error, warn, info, debug, trace; using info|loading configuration|no configuration file, using defaults|" +
		"configuration loaded|state: Starting|state: Running — accepting requests|told to stop, shutting down|all in-flight requests drained|shutdown complete"
	if got := strings.Join(messages, "|"); got != want {
		t.Errorf("logged\n%s\nwant\n%s", got, want)
	}
	running := stdout.one(t, "state: Running — accepting requests")
	if addr := fmt.Sprint(running["addr"]); !strings.HasPrefix(addr, "127.0.0.1:") || strings.HasSuffix(addr, ":0") {
		t.Errorf("addr is %s, want the bound one", addr)
	}
}

// TestListen: an IPv4 address stays one.
func TestListen(t *testing.T) {
	for addr, want := range map[string]string{"0.0.0.0:0": "0.0.0.0", "127.0.0.1:0": "127.0.0.1", ":0": "::"} {
		l, err := listen(addr)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Addr().(*net.TCPAddr).IP.String(); got != want {
			t.Errorf("%s is bound as %s, want %s", addr, got, want)
		}
		l.Close()
	}
}

// TestUsage: the help page names every flag and variable.
func TestUsage(t *testing.T) {
	for _, word := range []string{"-config PATH", "-listen ADDR", "-upstream URL", "-local ", "-check-config ", "-check ", "-version ", "-h ",
		"CONFIG_PATH", "LOG_LEVEL", "TAILSCALE_SOCKET", "HTTPS_PROXY", defaultConfigPath, defaultSocket, defaultListen, defaultLocal, defaultUpstream, "Exit codes: 0 "} {
		if !strings.Contains(usage, word) {
			t.Errorf("-h does not name %s", word)
		}
	}
	for line := range strings.Lines(usage) {
		if len(line) > 101 {
			t.Errorf("too long: %s", line)
		}
	}
}

func TestSignalName(t *testing.T) {
	for sig, want := range map[syscall.Signal]string{syscall.SIGTERM: "SIGTERM", syscall.SIGINT: "SIGINT", syscall.SIGHUP: "SIGHUP"} {
		if got := signalName(sig); got != want {
			t.Errorf("%d is %s, want %s", sig, got, want)
		}
	}
}

// TestTuneGC: the environment's word is final; else GOGC is ours, and a soft limit keeps it from wasting memory.
func TestTuneGC(t *testing.T) {
	oldPercent, oldLimit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	t.Cleanup(func() {
		debug.SetGCPercent(oldPercent)
		debug.SetMemoryLimit(oldLimit)
	})
	cfg := &config{bodyMemory: 48 << 20, maxConnections: 1000}
	for _, row := range []struct {
		name, gogc, gomemlimit string
		percent                int
		limit                  int64
	}{
		{name: "nothing set", percent: 400, limit: 32<<20 + 48<<20 + 1000*64<<10},
		{name: "GOGC", gogc: "50", percent: 100, limit: 32<<20 + 48<<20 + 1000*64<<10},
		{name: "GOMEMLIMIT", gomemlimit: "100MiB", percent: 400, limit: math.MaxInt64},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Setenv("GOGC", row.gogc)
			t.Setenv("GOMEMLIMIT", row.gomemlimit)
			debug.SetGCPercent(100)
			debug.SetMemoryLimit(math.MaxInt64)
			tuneGC(cfg)
			if percent, limit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1); percent != row.percent || limit != row.limit {
				t.Errorf("GOGC %d and limit %d, want %d and %d", percent, limit, row.percent, row.limit)
			}
		})
	}
}
