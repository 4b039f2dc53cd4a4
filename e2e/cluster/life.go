package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	corev1 "k8s.io/api/core/v1"
)

// configEdit changes one key, applies and restarts, as the runbook says.
func configEdit(ctx context.Context, w *world) (string, error) {
	p, err := w.redeploy(ctx, w.overlay.with("timeout_secs = 60", "timeout_secs = 61"))
	if err != nil {
		return "", err
	}
	line, err := w.kube.awaitLog(ctx, p, "proxy", `"configuration loaded"`)
	if err == nil && !strings.Contains(line, `"timeout_secs":61`) {
		err = fmt.Errorf("the pod's configuration is the old one: %s", line)
	}
	return "", w.healed(ctx, err)
}

// configBroken misspells a key. The line and column are those of config.toml.
func configBroken(ctx context.Context, w *world) (string, error) {
	broken := w.overlay.with("timeout_secs = 60", "timeout_sec = 60")
	configMap, err := broken.configMap()
	if err != nil {
		return "", err
	}
	before, _, _ := strings.Cut(configMap.Data["config.toml"], "timeout_sec = 60")
	at := fmt.Sprintf("config.toml:%d:%d:", strings.Count(before, "\n")+1, len(before)-strings.LastIndex(before, "\n"))

	if err := w.restart(ctx, broken); err != nil {
		return "", err
	}
	p, err := w.kube.await(ctx, "the proxy to exit with 2", func(p *pod) bool {
		s := p.status("proxy")
		return exitCode(s.State) == 2 || exitCode(s.LastTerminationState) == 2
	})
	if err != nil {
		return "", w.healed(ctx, err)
	}
	line, err := w.kube.awaitLog(ctx, p, "proxy", "configuration refused", at, "timeout_sec")
	return line, w.healed(ctx, err)
}

// exitCode is -1 while a container has not ended.
func exitCode(s corev1.ContainerState) int {
	if s.Terminated == nil {
		return -1
	}
	return int(s.Terminated.ExitCode)
}

// podDeleted has two streams over the tailnet when the pod is deleted: one ends
// 3 s later, the other never. Beside them, a client sends short requests: each
// that reached the upstream must be answered.
func podDeleted(ctx context.Context, w *world) (string, error) {
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	defer w.upstream.Handle(nil)
	ending, err := w.openStream(ctx, base, fakeanthropic.API{Deltas: 30, Interval: 100 * time.Millisecond})
	if err != nil {
		return "", err
	}
	endless, err := w.openStream(ctx, base, fakeanthropic.API{Deltas: 1e5, Interval: 100 * time.Millisecond})
	if err != nil {
		return "", err
	}
	watchCtx, stopWatch := context.WithCancel(ctx)
	defer stopWatch()
	last := w.watchPod(watchCtx, p.Name)

	stopRequests := w.requests(ctx, base)
	start := time.Now()
	_, err = w.kube.inNamespace(ctx, "delete", "pod", p.Name, "--wait=true")
	answered, lost := stopRequests()
	if err != nil {
		return "", err
	}
	gone := time.Since(start)
	first, second := <-ending, <-endless
	replacement, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	ready := time.Since(start)
	if replacement.UID == p.UID {
		return "", errors.New("the pod was not replaced")
	}
	stopWatch()
	final := <-last
	var errs []error
	if lost != 0 {
		errs = append(errs, fmt.Errorf("%d requests reached the upstream and were not answered", lost))
	}
	if first.err != nil {
		errs = append(errs, fmt.Errorf("the stream that ends in time was cut after %v: %w", first.at.Sub(start), first.err))
	}
	if second.err == nil {
		errs = append(errs, errors.New("the endless stream ended as if it were complete"))
	}
	if cut := second.at.Sub(start); cut < 4*time.Second || cut > 10*time.Second {
		errs = append(errs, fmt.Errorf("the endless stream was cut after %v, not 5 s", cut))
	}
	for _, container := range []string{"proxy", "tailscaled"} {
		if code := exitCode(final.status(container).State); code != 0 {
			errs = append(errs, fmt.Errorf("%s: exit code %d, not 0", container, code))
		}
	}
	return fmt.Sprintf("complete after %.1f s, cut after %.1f s, pod gone after %.1f s, its successor Ready after %.1f s; exit codes 0; %d requests answered meanwhile, none lost",
		first.at.Sub(start).Seconds(), second.at.Sub(start).Seconds(), gone.Seconds(), ready.Seconds(), answered), errors.Join(errs...)
}

// requests sends one short request after the other until stop is called, which
// returns how many were answered, and how many more the upstream has seen.
func (w *world) requests(ctx context.Context, base string) (stop func() (answered, lost int)) {
	before := w.modelRequests()
	ctx, cancel := context.WithCancel(ctx)
	answered := make(chan int, 1)
	go func() {
		n := 0
		for pause(ctx, 20*time.Millisecond) {
			if w.models(base) {
				n++
			}
		}
		answered <- n
	}()
	return func() (int, int) {
		cancel()
		n := <-answered
		return n, w.modelRequests() - before - n
	}
}

// models reports whether the list of models arrives, whole, within 2 s.
func (w *world) models(base string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v1/models", nil)
	if err != nil {
		return false
	}
	req.Header.Set("Authorization", "Bearer sk-ant-oat-testonly")
	resp, err := w.client.Do(req)
	if err != nil {
		return false
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return err == nil && resp.StatusCode == http.StatusOK && strings.Contains(string(text), "claude-fake-1")
}

// modelRequests counts what the upstream has seen of models.
func (w *world) modelRequests() (n int) {
	for _, r := range w.upstream.Requests() {
		if r.RequestURI == "/v1/models" {
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

// openStream starts a stream of the laptop and returns once its first event is
// there. The channel tells its end.
func (w *world) openStream(ctx context.Context, base string, api fakeanthropic.API) (<-chan streamEnd, error) {
	w.upstream.Handle(api)
	resp, err := post(ctx, w.client, base, streamedBody)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("opening a stream: status %d", resp.StatusCode)
	}
	first, end := make(chan struct{}), make(chan streamEnd, 1)
	var once sync.Once
	go func() {
		defer resp.Body.Close()
		err := events(resp.Body, func(string) { once.Do(func() { close(first) }) })
		once.Do(func() { close(first) }) // it ended before
		end <- streamEnd{time.Now(), err}
	}()
	<-first
	return end, nil
}

// watchPod follows a pod until ctx ends and then tells its last state, which
// polling would miss: the API server forgets a pod right after its last exit.
func (w *world) watchPod(ctx context.Context, podName string) <-chan *pod {
	last := make(chan *pod, 1)
	cmd := w.kube.command(ctx, "-n", name, "get", "pod", podName, "--watch", "-o", "json")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		last <- &pod{}
		return last
	}
	go func() {
		latest := &pod{}
		for decoder := json.NewDecoder(out); ; {
			next := new(pod)
			if decoder.Decode(next) != nil {
				break
			}
			latest = next
		}
		_ = cmd.Wait() // it was killed by ctx
		last <- latest
	}()
	return last
}

// rolloutKeepsName restarts the Deployment. The test control server neither
// renames a second node nor forgets the first, so what counts is that the old
// daemon has told it, before its end, to log the node out.
func rolloutKeepsName(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	follow := w.kube.command(ctx, "-n", name, "logs", "-f", p.Name, "-c", "tailscaled")
	log := make(chan string, 1)
	go func() {
		out, _ := follow.CombinedOutput() // what was said counts, however it ended
		log <- string(out)
	}()
	start := time.Now()
	if _, err := w.redeploy(ctx, w.overlay); err != nil {
		return "", err
	}
	took := time.Since(start).Round(100 * time.Millisecond)
	if _, err := w.tailnetURL(ctx); err != nil { // it checks the name
		return "", err
	}
	text := <-log
	if _, found := findLine(text, "logged out"); !found {
		return "", fmt.Errorf("the old sidecar did not log out; its last lines:\n%s", tail(text))
	}
	return fmt.Sprintf("restart to Ready %v, the name is still %s", took, name), nil
}
