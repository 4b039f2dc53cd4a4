package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// podDeleted has two streams over the tailnet when the pod is deleted: one ends 3 s later, the other never.
func podDeleted(t *test) {
	base, p := t.tailnetURL(), theOnly(t)
	const endless = 1e5 // deltas
	ending, cut := t.openStream(base, 30), t.openStream(base, endless)
	watched := t.follow("get", "pod", p.Name, "--watch", "--output-watch-events", "-o", "json")
	start := time.Now()
	t.kubectl("delete", "pod", p.Name, "--wait=true")
	gone := time.Since(start)
	_, completeErr := ending()
	cutAt, cutErr := cut()
	replacement := t.awaitReady()
	t.report("cut after %.1f s, pod gone after %.1f s, its successor Ready after %.1f s; exit codes 0",
		cutAt.Sub(start).Seconds(), gone.Seconds(), time.Since(start).Seconds())

	if replacement.UID == p.UID {
		t.errorf("the pod was not replaced")
	}
	if completeErr != nil {
		t.errorf("the stream that ends in time was cut: %w", completeErr)
	}
	if after := cutAt.Sub(start); cutErr == nil || after < 4*time.Second || after > 10*time.Second {
		t.errorf("the endless stream ended after %v with %v, want it cut after 5 s", after, cutErr)
	}
	// Asking would miss the last state: the API server forgets a pod right after its last exit.
	last := new(pod)
	for events := json.NewDecoder(strings.NewReader(watched())); events.More(); {
		var event struct{ Object *pod }
		t.check(events.Decode(&event))
		last = event.Object
	}
	for _, c := range containers {
		if code := exitCode(last.container(c).State); code != 0 {
			t.errorf("%s: exit code %d, not 0", c, code)
		}
	}
}

// openStream starts a stream of the laptop that has 10 deltas a second, and returns once its first event is there. end waits for
// its end: the error is nil if it was complete.
func (t *test) openStream(base string, deltas int) (end func() (at time.Time, err error)) {
	t.upstream.Handle(fakeanthropic.API{Deltas: deltas, Interval: 100 * time.Millisecond})
	resp := must(t.client.Do(t.request(base+messages, proxytest.Stream)))(t)
	t.cleanup(func() { resp.Body.Close() })
	body := bufio.NewReader(resp.Body)
	if first, err := body.ReadString('\n'); resp.StatusCode != http.StatusOK || !strings.HasPrefix(first, "event: ") {
		t.fatalf("opening a stream: status %d, %q, %v", resp.StatusCode, first, err)
	}
	var err error
	var at time.Time
	var reading sync.WaitGroup
	reading.Go(func() {
		var text []byte
		text, err = io.ReadAll(body)
		at = time.Now()
		if err == nil && !bytes.Contains(text, []byte("event: message_stop")) {
			err = io.ErrUnexpectedEOF
		}
	})
	return func() (time.Time, error) { reading.Wait(); return at, err }
}

// follow starts a kubectl that goes on and on. What it returns ends that, and returns what was said.
func (t *test) follow(args ...string) (end func() string) {
	cmd := t.kubectlCommand(args...)
	var said bytes.Buffer
	cmd.Stdout = &said
	t.check(cmd.Start())
	return func() string {
		pause(t.ctx, time.Second) // for the last words
		_ = cmd.Process.Kill()    // it may have ended
		_ = cmd.Wait()            // it was killed
		return said.String()
	}
}
