package proxytest

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// Main runs a package's tests and removes the binary that they built. Use it in every TestMain of a package that calls [Build].
func Main(m *testing.M) int {
	code := m.Run()
	if err := Cleanup(); err != nil {
		fmt.Fprintln(os.Stderr, "removing the built proxy:", err)
		return 1
	}
	return code
}

// Launch starts the proxy for a test and stops it at the test's end. A test that failed shows the proxy's log. Output on standard
// error fails the test, so a data race found by the detector does too; only a proxy that ended with exit code 1 or 2 may say why,
// unless that is a crash, whose code is 2 as well.
func Launch(t testing.TB, o Options) *Proxy {
	t.Helper()
	p := Must(Start(o))(t)
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
		code, said := p.state.ExitCode(), p.Stderr()
		if said != "" && (code != 1 && code != 2 || strings.Contains(said, "\ngoroutine ")) {
			t.Errorf("the proxy wrote to stderr: %s", said)
		}
		if t.Failed() {
			t.Logf("the proxy's log:\n%s", p.Stdout())
		}
	})
	return p
}

// Local starts the proxy without a tailnet on a free port of 127.0.0.1, with this upstream, config (may be empty) and
// environment, and waits until it accepts requests.
func Local(t testing.TB, upstream, config string, env ...string) *Proxy {
	t.Helper()
	p := Launch(t, Options{
		Args:   Serve(upstream),
		Config: config,
		Env:    env,
	})
	Check(t, p.WaitRunning(Timeout))
	return p
}

// WaitLog is [Proxy.WaitLog] for tests, with [Timeout].
func WaitLog(t testing.TB, p *Proxy, message string) Line {
	t.Helper()
	return Must(p.WaitLog(message, Timeout))(t)
}

// Scrape is [Proxy.Metrics] for tests.
func Scrape(t testing.TB, p *Proxy) Metrics {
	t.Helper()
	return Must(p.Metrics())(t)
}

// Result is how a proxy ended that was to end by itself.
type Result struct {
	Code   int
	Stdout string
	Stderr string
}

// Exec runs the proxy to its end, for invocations that do not serve.
func Exec(t testing.TB, o Options) Result {
	t.Helper()
	p := Must(Start(o))(t)
	code, err := p.Wait(Timeout)
	Check(t, errors.Join(err, p.Stop()))
	return Result{Code: code, Stdout: p.Stdout(), Stderr: p.Stderr()}
}

// Poll waits until there is nothing wrong any more. After [Timeout] its error is what was wrong last.
func Poll(wrong func() string) error { return poll(Timeout, wrong) }

func poll(limit time.Duration, wrong func() string) error {
	for deadline := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
		said := wrong()
		if said == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %v: %s", limit, said)
		}
	}
}

// Await is [Poll] for tests.
func Await(t testing.TB, wrong func() string) {
	t.Helper()
	Check(t, Poll(wrong))
}

// Eventually waits until ok is true and returns how long that took. After [Timeout] the test fails.
func Eventually(t testing.TB, what string, ok func() bool) time.Duration {
	t.Helper()
	return Within(t, Timeout, what, ok)
}

// Within is [Eventually] with a limit of its own.
func Within(t testing.TB, limit time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	Check(t, poll(limit, func() string {
		if ok() {
			return ""
		}
		return "still not: " + what
	}))
	return time.Since(start)
}
