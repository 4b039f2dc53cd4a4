package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// open lets callers in that tailscaled does not know, so that load comes to the
// pod past the sidecar and its CPU limit.
func (w *world) open() overlay {
	return w.overlay.with("require_tailnet = true", "require_tailnet = false")
}

// memory is what a container's process has used at most, in MiB.
type memory struct{ rss, limit int64 }

func (m memory) String() string { return fmt.Sprintf("RSS at most %d of %d MiB", m.rss, m.limit) }

// peak reads the largest RSS so far of a container's process, and fails if it
// was restarted since before, by the kernel's OOM killer or otherwise.
func (w *world) peak(ctx context.Context, before *pod, container, program string) (memory, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return memory{}, err
	}
	s := p.status(container)
	if p.UID != before.UID || s.RestartCount != before.status(container).RestartCount {
		return memory{}, fmt.Errorf("%s was restarted: %+v", container, s.LastTerminationState.Terminated)
	}
	pid, err := process(p, container, program)
	if err != nil {
		return memory{}, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return memory{}, err
	}
	line, _ := findLine(string(status), "VmHWM:")
	fields := strings.Fields(line)
	if len(fields) != 3 {
		return memory{}, fmt.Errorf("no VmHWM in %s", status)
	}
	kib, err := strconv.ParseInt(fields[1], 10, 64)
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		if c.Name == container {
			return memory{kib >> 10, c.Resources.Limits.Memory().Value() >> 20}, err
		}
	}
	return memory{}, fmt.Errorf("no container %s", container)
}

// herd runs n calls of one at a time each, at once, and returns the first few errors.
func herd(n int, one func(i int) error) error {
	errs := make([]error, n)
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { errs[i] = one(i) })
	}
	all.Wait()
	var some []error
	failed := 0
	for _, err := range errs {
		if err == nil {
			continue
		}
		if failed++; failed <= 3 {
			some = append(some, err)
		}
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d failed: %w", failed, n, errors.Join(some...))
	}
	return nil
}

// pool is a client without a limit on idle connections.
func pool() *http.Client {
	return &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000, DisableCompression: true}}
}

// thousandStreams keeps a thousand streams open together before any may end.
func thousandStreams(ctx context.Context, w *world) (string, error) {
	const streams = 1000
	p, err := w.redeploy(ctx, w.open())
	if err != nil {
		return "", err
	}
	client := pool()
	defer client.CloseIdleConnections()
	gate := newGate(streams)
	w.upstream.Handle(gate)
	defer w.upstream.Handle(nil)
	start := time.Now()
	err = herd(streams, func(int) error {
		resp, err := post(ctx, client, p.url(""), streamedBody)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		return events(resp.Body, func(string) {})
	})
	if err != nil {
		return "", w.healed(ctx, err)
	}
	used, err := w.peak(ctx, p, "proxy", name)
	return fmt.Sprintf("%d streams open at once, all complete after %.1f s; %v", streams, time.Since(start).Seconds(), used), err
}

// gate answers streams that all stay open until the last of them has begun.
type gate struct {
	missing atomic.Int64
	opened  chan struct{}
}

func newGate(streams int64) *gate {
	g := &gate{opened: make(chan struct{})}
	g.missing.Store(streams)
	return g
}

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	fakeanthropic.WriteEvent(w, object{"type": "message_start"})
	if g.missing.Add(-1) == 0 {
		close(g.opened)
	}
	select {
	case <-g.opened:
	case <-r.Context().Done():
		return
	}
	for range 20 {
		fakeanthropic.WriteEvent(w, object{"type": "content_block_delta", "text": strings.Repeat("word ", 20)})
	}
	fakeanthropic.WriteEvent(w, object{"type": "message_stop"})
}

// manyUploads sends many times what body_memory_mb holds at once; the others
// wait in line and are served too. It follows thousandStreams, in the same pod.
func manyUploads(ctx context.Context, w *world) (string, error) {
	const uploads, size = 60, 10 << 20
	p, err := w.redeploy(ctx, w.open())
	if err != nil {
		return "", err
	}
	w.upstream.Handle(http.HandlerFunc(counting))
	defer w.upstream.Handle(nil)
	client := pool()
	defer client.CloseIdleConnections()
	body := bytes.Repeat([]byte("x"), size)
	start := time.Now()
	queued := mostQueued(p)
	err = herd(uploads, func(int) error { return upload(ctx, client, p.url(""), body) })
	took := time.Since(start)
	most := queued()
	if most == 0 {
		err = errors.Join(err, errors.New("proxy_requests_queued stayed 0: the budget was not used up"))
	}
	used, peakErr := w.peak(ctx, p, "proxy", name)
	err = errors.Join(err, peakErr)
	return fmt.Sprintf("%d uploads of 10 MiB at once took %.1f s, up to %d queued; %v", uploads, took.Seconds(), most, used), w.healed(ctx, err)
}

// counting answers with the number of bytes that arrived.
func counting(w http.ResponseWriter, r *http.Request) {
	n, _ := io.Copy(io.Discard, r.Body) // the client knows how many it sent
	fmt.Fprint(w, n)
}

// upload sends a body to a counting upstream.
func upload(ctx context.Context, client *http.Client, base string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/files", bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && string(answer) != strconv.Itoa(len(body)) {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, answer)
	}
	return err
}

// mostQueued samples proxy_requests_queued until stop is called, which returns
// the largest.
func mostQueued(p *pod) (stop func() int) {
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan int, 1)
	go func() {
		most := 0
		for pause(ctx, 100*time.Millisecond) {
			_, metrics, err := get(ctx, p.own("/metrics"))
			if err != nil {
				continue // the next one may be in time
			}
			for line := range strings.Lines(metrics) {
				if value, found := strings.CutPrefix(line, "proxy_requests_queued "); found {
					n, _ := strconv.Atoi(strings.TrimSpace(value)) // it is a whole number
					most = max(most, n)
				}
			}
		}
		result <- most
	}()
	return func() int {
		cancel()
		return <-result
	}
}

// tailnetLoad is what the sidecar's CPU limit lets through, told apart from the
// proxy's own figures.
func tailnetLoad(ctx context.Context, w *world) (string, error) {
	const clients, each = 20, 10
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	start := time.Now()
	err = herd(clients, func(int) error {
		for range each {
			if _, err := ask(ctx, w.client, base, plainBody); err != nil {
				return err
			}
		}
		return nil
	})
	return fmt.Sprintf("%d clients: %.0f requests per second", clients, clients*each/time.Since(start).Seconds()), err
}

// tailnetUploads keeps many uploads under way over the tailnet: the sidecar buffers what it forwards. Where they share its
// quarter of a CPU, one may starve for 10 s and be told to try again, as Anthropic's SDKs do.
func tailnetUploads(ctx context.Context, w *world) (string, error) {
	const clients, size = 50, 5_000_000
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	before, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	w.upstream.Handle(http.HandlerFunc(counting))
	defer w.upstream.Handle(nil)
	body := bytes.Repeat([]byte("x"), size)
	start, uploads, repeated := time.Now(), atomic.Int64{}, atomic.Int64{}
	err = herd(clients, func(int) error {
		for tries := 1; time.Since(start) < time.Minute || tries > 1; tries++ {
			err := upload(ctx, w.client, base, body)
			switch {
			case err == nil:
				uploads.Add(1)
				tries = 0
			case tries <= 2 && strings.HasPrefix(err.Error(), "status 408"):
				repeated.Add(1)
			default:
				return err
			}
		}
		return nil
	})
	took := time.Since(start).Seconds()
	sidecar, peakErr := w.peak(ctx, before, "tailscaled", "tailscaled")
	used, proxyErr := w.peak(ctx, before, "proxy", name)
	return fmt.Sprintf("%d uploads in %.0f s, %d repeated: %.1f MB/s; tailscaled: %v; proxy: %v", uploads.Load(), took, repeated.Load(), float64(uploads.Load()*size)/took/1e6, sidecar, used),
		errors.Join(err, peakErr, proxyErr)
}
