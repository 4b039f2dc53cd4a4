package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// podDeleted has two streams over the tailnet when the pod is deleted: one ends
// 3 s later, the other never. Beside them, a client sends short requests: each
// that reached the upstream must be answered.
func podDeleted(t *test) {
	base, p := t.tailnetURL(), theOnly(t)
	endingStream := t.openStream(base, 30)
	endlessStream := t.openStream(base, endless)
	last := t.watchPod(p.Name)
	stopRequests := t.shortRequests(base)
	start := time.Now()
	t.kubectl("delete", "pod", p.Name, "--wait=true")
	answered, lost := stopRequests()
	gone := time.Since(start)
	complete, cut := <-endingStream, <-endlessStream
	replacement := t.awaitReady()
	t.report("complete after %.1f s, cut after %.1f s, pod gone after %.1f s, its successor Ready after %.1f s; exit codes 0; "+
		"%d requests answered meanwhile, none lost",
		complete.at.Sub(start).Seconds(), cut.at.Sub(start).Seconds(), gone.Seconds(), time.Since(start).Seconds(), answered)

	if replacement.UID == p.UID {
		t.errorf("the pod was not replaced")
	}
	if lost != 0 {
		t.errorf("%d requests reached the upstream and were not answered", lost)
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
	final := <-last
	for _, c := range containers {
		if code := exitCode(final.container(c).State); code != 0 {
			t.errorf("%s: exit code %d, not 0", c, code)
		}
	}
}

// shortRequests sends one after the other until stop is called, which returns
// how many were answered, and how many more the upstream has seen.
func (t *test) shortRequests(base string) (stop func() (answered, lost int)) {
	before := t.seen("/v1/models")
	client := *t.client
	client.Timeout = 2 * time.Second
	sending, cancel := context.WithCancel(t.ctx)
	answered := make(chan int, 1)
	go func() {
		n := 0
		for pause(sending, 20*time.Millisecond) {
			_, err := t.try(t.ctx, func(t *test) { // not sending's: what is under way may end
				if models := t.ask(&client, base+"/v1/models", ""); !strings.Contains(models, "claude-fake-1") {
					t.fatalf("the answer is not whole: %s", models)
				}
			})
			if err == nil {
				n++
			}
		}
		answered <- n
	}()
	return func() (int, int) {
		cancel()
		n := <-answered
		return n, t.seen("/v1/models") - before - n
	}
}

// seen counts the requests of a path that have come to the upstream.
func (t *test) seen(path string) (n int) {
	for _, r := range t.upstream.Requests() {
		if r.RequestURI == path {
			n++
		}
	}
	return n
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
		_, err := events(body)
		end <- streamEnd{time.Now(), err}
	}()
	return end
}

// watchPod follows a pod until it is deleted and then tells its last state, which
// polling would miss: the API server forgets a pod right after its last exit.
func (t *test) watchPod(podName string) <-chan *pod {
	cmd := t.kubectlCommand("get", "pod", podName, "--watch", "--output-watch-events", "-o", "json")
	out, err := cmd.StdoutPipe()
	t.check(err)
	t.check(cmd.Start())
	last := make(chan *pod, 1)
	go func() {
		var event struct {
			Type   string
			Object *pod
		}
		for decoder := json.NewDecoder(out); event.Type != "DELETED"; {
			event.Object = new(pod)
			if decoder.Decode(&event) != nil { // the criterion has ended
				break
			}
		}
		last <- event.Object
		_ = cmd.Process.Kill() // it watches for ever
		_ = cmd.Wait()         // it was killed
	}()
	return last
}
