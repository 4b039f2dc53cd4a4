package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestParseArgs: flags win over the environment.
func TestParseArgs(t *testing.T) {
	for _, row := range []struct {
		args []string
		env  map[string]string
		want options
		err  string // in the error
	}{
		{},
		{args: []string{"-config", "c", "-listen", "l", "-upstream", "u", "-local", "-check-config", "-check", "-version"},
			want: options{overrides: overrides{path: "c", listen: "l", upstream: "u", local: true}, checkConfig: true, check: true, version: true}},
		{args: []string{"--config=c", "--local=false"}, want: options{overrides: overrides{path: "c"}}},
		{env: map[string]string{"CONFIG_PATH": "e", "TAILSCALE_SOCKET": "/s", "LOG_LEVEL": "debug"}, want: options{overrides: overrides{path: "e", socket: "/s"}, logLevel: "debug"}},
		{args: []string{"-config", "c"}, env: map[string]string{"CONFIG_PATH": "e"}, want: options{overrides: overrides{path: "c"}}},
		{args: []string{"-listen"}, err: "flag needs an argument: -listen"},
		{args: []string{"-local=maybe"}, err: "invalid boolean value"},
	} {
		got, err := parseArgs(row.args, func(name string) string { return row.env[name] }, io.Discard)
		if row.err == "" {
			equal(t, fmt.Sprint(row.args), *got, row.want)
		} else {
			holds(t, strings.Contains(errorText(err), row.err) && exitCode(err) == 2, "the error is %v (exit code %d), want 2 and %q", err, exitCode(err), row.err)
		}
	}
}

// TestRun covers what ends by itself.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	bad, warned := filepath.Join(dir, "bad.toml"), filepath.Join(dir, "warned.toml")
	for path, text := range map[string]string{bad: "[proxy]\ntimeout_secs = 0\nmax_connections = 0\n", warned: "tailscale.state_dir = 'x'"} {
		equal(t, path, os.WriteFile(path, []byte(text), 0o600), nil)
	}
	busy := must(net.Listen("tcp", "127.0.0.1:0"))
	defer busy.Close()
	problems := bad + ":2:16: proxy.timeout_secs must be a whole number from 1 to 3600\n" + bad + ":3:19: proxy.max_connections must be a whole number from 1 to 100000\n"
	for name, row := range map[string]struct {
		args           []string
		configPath     string // in the environment
		code           int
		stdout, stderr string // "…" at an end: only the rest counts
	}{
		"help":                        {args: []string{"-h"}, stdout: usage},
		"help beside others":          {args: []string{"-local", "--help", "-nope"}, stdout: usage},
		"version":                     {args: []string{"-version"}, stdout: "anthropic-oauth-proxy " + version + ", revision " + buildRevision() + ", " + runtime.Version() + "\n"},
		"bad flag":                    {args: []string{"-nope"}, code: 2, stderr: "anthropic-oauth-proxy: flag provided but not defined: -nope; -h lists what there is\n"},
		"stray argument under -check": {args: []string{"-check", "x"}, code: 2, stderr: "anthropic-oauth-proxy: unexpected argument \"x\"; -h lists what there is\n"},
		"-check-config": {args: []string{"-check-config", "-config", warned, "-listen", ":1"}, stdout: testConfig(t, "", overrides{listen: ":1"}).toml(),
			stderr: "warning: " + warned + ":1:11: tailscale.state_dir is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line\n"},
		"-check-config of a bad file": {args: []string{"-check-config", "-config", bad}, code: 2, stderr: problems},
		"-check of a bad file":        {args: []string{"-check"}, configPath: bad, code: 2, stderr: problems},
		"bad file":                    {args: []string{"-config", bad}, code: 2, stdout: `…"error":"` + bad + `:3:19: proxy.max_connections must be a whole number from 1 to 100000"}` + "\n", stderr: problems},
		"port in use":                 {args: []string{"-local", "-listen", busy.Addr().String()}, code: 1, stdout: "…address already in use\"}\n"},
	} {
		var stdout, stderr bytes.Buffer
		getenv := func(name string) string { return map[string]string{"CONFIG_PATH": row.configPath}[name] }
		equal(t, name+": the exit code", exitCode(run(t.Context(), row.args, getenv, &stdout, &stderr)), row.code)
		for stream, pair := range map[string][2]string{"stdout": {stdout.String(), row.stdout}, "stderr": {stderr.String(), row.stderr}} {
			got, want := pair[0], pair[1]
			if rest, partly := strings.CutPrefix(want, "…"); partly {
				got, want = got[max(0, len(got)-len(rest)):], rest
			}
			equal(t, name+": "+stream, got, want)
		}
	}
}

// TestRunServes starts and stops the program on a real port.
func TestRunServes(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var stdout logRecorder
	var stderr bytes.Buffer
	ended := make(chan error, 1)
	getenv := func(name string) string { return map[string]string{"LOG_LEVEL": "loud"}[name] }
	go func() { ended <- run(ctx, []string{"-local", "-listen", "127.0.0.1:0"}, getenv, &stdout, &stderr) }()
	for deadline := time.Now().Add(30 * time.Second); len(stdout.lines(t, "state: Running — accepting requests")) == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not run after 30 s")
		}
	}
	stop()
	equal(t, "it ended with", <-ended, nil)
	equal(t, "it wrote to stderr", stderr.String(), "")
	var messages []string
	for _, line := range stdout.lines(t) {
		messages = append(messages, line["message"].(string))
	}
	want := "starting anthropic-oauth-proxy|LOG_LEVEL is not one of error, warn, info, debug, trace; using info|loading configuration|no configuration file, using defaults|" +
		"configuration loaded|state: Starting|state: Running — accepting requests|told to stop, shutting down|all in-flight requests drained|shutdown complete"
	equal(t, "logged", strings.Join(messages, "|"), want)
	running := stdout.one(t, "state: Running — accepting requests")
	addr := fmt.Sprint(running["addr"])
	holds(t, strings.HasPrefix(addr, "127.0.0.1:") && !strings.HasSuffix(addr, ":0"), "addr is %s, want the bound one", addr)
}

// TestListen: an IPv4 address stays one.
func TestListen(t *testing.T) {
	for addr, want := range map[string]string{"0.0.0.0:0": "0.0.0.0", "127.0.0.1:0": "127.0.0.1", ":0": "::"} {
		for _, l := range must(listen(addr)) {
			equal(t, addr, l.Addr().(*net.TCPAddr).IP.String(), want)
			l.Close()
		}
	}
}

// TestTuneMemory: the environment's word is final; else GOGC is ours, and a soft limit keeps it from wasting memory.
func TestTuneMemory(t *testing.T) {
	oldPercent, oldLimit := debug.SetGCPercent(100), debug.SetMemoryLimit(-1)
	t.Cleanup(func() {
		debug.SetGCPercent(oldPercent)
		debug.SetMemoryLimit(oldLimit)
	})
	cfg := &config{bodyMemory: 48 << 20, maxConnections: 1000}
	const limit = 32<<20 + 48<<20 + 1000*64<<10
	for _, row := range []struct {
		gogc, gomemlimit                   string
		percent, given, limit, connections int64
	}{
		{percent: 400, given: math.MaxInt64, limit: limit, connections: 1684}, {gogc: "50", percent: 100, given: math.MaxInt64, limit: limit, connections: 1684},
		{gomemlimit: "100MiB", percent: 400, given: 100 << 20, limit: 100 << 20, connections: 538}, {gomemlimit: "64MiB", percent: 400, given: 64 << 20, limit: 64 << 20, connections: 16},
		{gomemlimit: "384MiB", percent: 400, given: 384 << 20, limit: 384 << 20, connections: 5461},
	} {
		t.Setenv("GOGC", row.gogc)
		t.Setenv("GOMEMLIMIT", row.gomemlimit)
		debug.SetGCPercent(100)
		debug.SetMemoryLimit(row.given)
		connections := tuneMemory(cfg)
		got := []int64{int64(debug.SetGCPercent(100)), debug.SetMemoryLimit(-1), int64(connections)}
		equal(t, fmt.Sprintf("GOGC, limit and connections with %q, %q", row.gogc, row.gomemlimit), got, []int64{row.percent, row.limit, row.connections})
	}
}

// TestShutDown holds the sequence of the runbook to the clock. Requests take as long as their path says.
func TestShutDown(t *testing.T) {
	const (
		drained  = "all in-flight requests drained"
		exceeded = "drain timeout exceeded, forcing shutdown"
		complete = "shutdown complete"
		again    = "received SIGINT again, exiting at once"
	)
	type row struct {
		settings string
		signal   syscall.Signal // SIGTERM if 0
		requests []string       // durations
		began    bool           // their answers begin at once
		ends     time.Duration  // the drain, after the signal
		says     string         // and why
		answers  []string       // in the order of requests
	}
	inBubbles(t, map[string]row{
		"idle": {says: drained}, "closed terminal": {signal: syscall.SIGHUP, says: drained},
		"drained":                               {requests: []string{"3s", "4s"}, ends: 4 * time.Second, says: drained, answers: []string{"200 after 3s, last", "200 after 4s, last"}},
		"exceeded":                              {requests: []string{"3s", "1h", "1h"}, ends: 5 * time.Second, says: exceeded, answers: []string{"200 after 3s, last", "503 after 5s, last", "503 after 5s, last"}},
		"exceeded while streaming":              {began: true, requests: []string{"1h"}, ends: 5 * time.Second, says: exceeded, answers: []string{"cut after 5s"}},
		"configured":                            {settings: "drain_timeout_secs = 3600\ntimeout_secs = 3600", requests: []string{"59m"}, began: true, ends: 59 * time.Minute, says: drained, answers: []string{"200 after 59m0s"}},
		"no drain at all":                       {settings: "drain_timeout_secs = 0", requests: []string{"1s"}, says: exceeded, answers: []string{"503 after 0s, last"}},
		"queued requests are sent away at once": {settings: "max_connections = 1", requests: []string{"2s", "1s", "1s"}, ends: 2 * time.Second, says: drained, answers: []string{"200 after 2s, last", "503 after 0s, last", "503 after 0s, last"}},
		"second signal":                         {requests: []string{"1h"}, ends: 2 * time.Second, says: again, answers: []string{"503 after 2s, last"}},
	}, func(t *testing.T, row row) {
		r := newRig(t, row.settings, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			if row.began {
				http.NewResponseController(w).Flush()
			}
			d, _ := time.ParseDuration(r.URL.Path[1:])
			select {
			case <-time.After(d):
			case <-r.Context().Done():
			}
		})
		answers := make([]answer, len(row.requests))
		var wg sync.WaitGroup
		for i, path := range row.requests {
			wg.Go(func() { answers[i] = r.do("POST", "/"+path, "x") })
			synctest.Wait()
		}
		start := time.Now()
		r.signals <- cmp.Or(row.signal, syscall.SIGTERM)
		name := map[syscall.Signal]string{0: "SIGTERM", syscall.SIGHUP: "SIGHUP"}[row.signal]
		want := []string{"received " + name + ", shutting down after 0s", fmt.Sprint(row.says, " after ", row.ends)}
		if row.says == again {
			time.Sleep(row.ends)
			r.signals <- syscall.SIGINT
		} else {
			want = append(want, complete)
		}
		<-r.done
		took := time.Since(start)
		equal(t, "it ended with", r.err, nil)
		equal(t, "in time", took >= row.ends && took <= row.ends+2*lastBytes, true)
		wg.Wait()
		var got []string
		for _, line := range r.log.lines(t, "received SIGTERM, shutting down", "received SIGHUP, shutting down", drained, exceeded, complete, again) {
			text := line["message"].(string)
			if text != complete { // which may come lastBytes later
				text = fmt.Sprint(text, " after ", line.time().Sub(start))
			}
			got = append(got, text)
		}
		equal(t, "logged", got, want)
		left := 0.0
		for i, a := range answers {
			a.expect(t, row.answers[i])
			if a.status != 200 || a.err != nil {
				left++
			}
			equal(t, "it may be tried again", a.header.Get("X-Should-Retry") == "true", a.status == 503)
		}
		if row.says == exceeded {
			r.log.one(t, exceeded).expect(t, "remaining", left, "drain_timeout_secs", row.ends.Seconds())
		}
		if row.says != again {
			equal(t, "requests with a line in the log", len(r.log.lines(t, "request completed")), len(row.requests))
		}
	})
}

// TestShutDownRefusesNewRequests: on connections that are open already, while others drain.
func TestShutDownRefusesNewRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", never)
		idle := r.dialRaw()
		go r.post()
		synctest.Wait()
		// Half of a request: a connection that is idle would be closed.
		idle.send("POST / HTTP/1.1\r\n")
		r.signals <- syscall.SIGTERM
		synctest.Wait()
		go idle.send("Host: x\r\nContent-Length: 5\r\n\r\n") // and the body stays away
		got := idle.answer()
		got.expect(t, "503 after 0s, last")
		equal(t, "it says why", strings.Contains(got.body, `"code":"shutting_down"`), true)
		_, err := r.front.dial(t.Context(), "", "")
		holds(t, err != nil, "a new connection was accepted")
	})
}
