package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// podDeleted has two streams over the tailnet when the pod is deleted: one ends 3 s later, the other never.
func podDeleted(t *test) {
	base, p := t.tailnetURL(), theOnly(t)
	endingStream := t.openStream(base, 30)
	endlessStream := t.openStream(base, endless)
	watched := t.follow("get", "pod", p.Name, "--watch", "--output-watch-events", "-o", "json")
	start := time.Now()
	t.kubectl("delete", "pod", p.Name, "--wait=true")
	gone := time.Since(start)
	complete, cut := <-endingStream, <-endlessStream
	replacement := t.awaitReady()
	t.report("complete after %.1f s, cut after %.1f s, pod gone after %.1f s, its successor Ready after %.1f s; exit codes 0",
		complete.at.Sub(start).Seconds(), cut.at.Sub(start).Seconds(), gone.Seconds(), time.Since(start).Seconds())

	if replacement.UID == p.UID {
		t.errorf("the pod was not replaced")
	}
	if complete.err != nil {
		t.errorf("the stream that ends in time was cut after %v: %w", complete.at.Sub(start), complete.err)
	}
	if cut.err == nil {
		t.errorf("the endless stream ended as if it were complete")
	}
	if after := cut.at.Sub(start); after < 4*time.Second || after > 10*time.Second {
		t.errorf("the endless stream was cut after %v, not 5 s", after)
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

// streamEnd is how a stream ended: err is nil if it was complete.
type streamEnd struct {
	at  time.Time
	err error
}

// endless is the number of events of a stream that lasts longer than any criterion.
const endless = 1e5

// openStream starts a stream of the laptop that has 10 deltas a second, and returns once its first event is there. The channel
// tells its end.
func (t *test) openStream(base string, deltas int) <-chan streamEnd {
	t.upstream.Handle(fakeanthropic.API{Deltas: deltas, Interval: 100 * time.Millisecond})
	resp := t.send(t.client, base+messages, streamedBody)
	body := bufio.NewReader(resp.Body)
	first, err := body.ReadString('\n')
	if err != nil || resp.StatusCode != http.StatusOK || !strings.HasPrefix(first, "event: ") {
		t.fatalf("opening a stream: status %d, %q, %v", resp.StatusCode, first, err)
	}
	end := make(chan streamEnd, 1)
	go func() {
		err := events(body)
		end <- streamEnd{time.Now(), err}
	}()
	return end
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
