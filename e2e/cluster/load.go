package main

import (
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// peak tells the largest RSS so far of a container's process. It fails if that
// was restarted since before, by the kernel's OOM killer or otherwise.
func (t *test) peak(before *pod, container, program string) string {
	p := theOnly(t)
	t.wantRestarts(before, p)
	status := must(t.process(p, container, program).NewStatus())(t)
	for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
		if c.Name == container {
			return fmt.Sprintf("%s: RSS at most %d of %d MiB", container, status.VmHWM>>20, c.Resources.Limits.Memory().Value()>>20)
		}
	}
	t.fatalf("no container %s", container)
	return ""
}

// pastTailnet lets callers in that tailscaled does not know, so that load comes to
// the pod past the sidecar and its CPU limit. The client has no limit on idle connections.
func (t *test) pastTailnet() (*pod, *http.Client) {
	t.alter(edit("require_tailnet = true", "require_tailnet = false"))
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2000, DisableCompression: true}}
	t.cleanup(client.CloseIdleConnections)
	return t.awaitReady(), client
}

// thousandStreams keeps a thousand streams open together before any may end.
func thousandStreams(t *test) {
	const streams = 1000
	p, client := t.pastTailnet()
	t.upstream.Handle(meeting(streams))
	start := time.Now()
	t.together(streams, func(t *test) {
		t.check(events(t.send(client, p.url()+messages, streamedBody).Body))
	})
	took := time.Since(start)
	t.report("%d streams open at once, all complete after %.1f s; %s", streams, took.Seconds(), t.peak(p, "proxy", name))
}

// meeting answers streams that all stay open until the last of them has begun.
func meeting(streams int64) http.HandlerFunc {
	var begun atomic.Int64
	all := make(chan struct{})
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		fakeanthropic.WriteEvent(w, object{"type": "message_start"})
		if begun.Add(1) == streams {
			close(all)
		}
		select {
		case <-all:
		case <-r.Context().Done():
			return
		}
		for range 20 {
			fakeanthropic.WriteEvent(w, object{"type": "content_block_delta", "text": strings.Repeat("word ", 20)})
		}
		fakeanthropic.WriteEvent(w, object{"type": "message_stop"})
	}
}

// manyUploads sends many times what body_memory_mb holds at once; the others wait in line and are served too.
func manyUploads(t *test) {
	const uploads, size = 60, 10 << 20
	p, client := t.pastTailnet()
	t.upstream.Handle(http.HandlerFunc(count))
	body := strings.Repeat("x", size)
	start := time.Now()
	all := make(chan error, 1)
	go func() {
		_, err := t.try(t.ctx, func(t *test) {
			t.together(uploads, func(t *test) {
				if arrived := t.ask(client, p.url()+files, body); arrived != strconv.Itoa(size) {
					t.fatalf("%s bytes of %d arrived", arrived, size)
				}
			})
		})
		all <- err
	}()
	queued := regexp.MustCompile(`(?m)^proxy_requests_queued [1-9]`)
	t.await("a line, without which the budget is not used up", func(t *test) {
		if !queued.MatchString(t.ask(http.DefaultClient, p.own()+"/metrics", "")) {
			t.fatalf("proxy_requests_queued is 0")
		}
	})
	t.check(<-all)
	t.report("%d uploads of 10 MiB at once took %.1f s, some in line; %s", uploads, time.Since(start).Seconds(), t.peak(p, "proxy", name))
}

// files is where uploads go.
const files = "/v1/files"

// count answers with the number of bytes that arrived.
func count(w http.ResponseWriter, r *http.Request) {
	n, _ := io.Copy(io.Discard, r.Body) // the client knows how many it sent
	fmt.Fprint(w, n)
}

// tailnetLoad is what the sidecar's CPU limit lets through, told apart from the proxy's own figures.
func tailnetLoad(t *test) {
	const clients, each = 20, 10
	url := t.tailnetURL() + messages
	start := time.Now()
	t.together(clients, func(t *test) {
		for range each {
			t.ask(t.client, url, plainBody)
		}
	})
	t.report("%d clients: %.0f requests per second", clients, clients*each/time.Since(start).Seconds())
}

// tailnetUploads keeps many uploads under way over the tailnet: the sidecar buffers what it forwards. Where they share its
// quarter of a CPU, one may starve for 10 s and be told to try again, as Anthropic's SDKs do.
func tailnetUploads(t *test) {
	const clients, size = 50, 5_000_000
	url, before := t.tailnetURL()+files, theOnly(t)
	t.upstream.Handle(http.HandlerFunc(count))
	body := strings.Repeat("x", size)
	var uploads, repeated atomic.Int64
	start := time.Now()
	t.together(clients, func(t *test) {
		for tries := 0; time.Since(start) < time.Minute || tries > 0; {
			switch status, answer := t.exchange(t.client, url, body); {
			case answer == strconv.Itoa(size):
				uploads.Add(1)
				tries = 0
			case status == http.StatusRequestTimeout && tries < 2:
				repeated.Add(1)
				tries++
			default:
				t.fatalf("status %d: %s", status, answer)
			}
		}
	})
	took := time.Since(start).Seconds()
	t.report("%d uploads in %.0f s, %d repeated: %.1f MB/s; %s; %s", uploads.Load(), took, repeated.Load(),
		float64(uploads.Load()*size)/took/1e6, t.peak(before, "tailscaled", "tailscaled"), t.peak(before, "proxy", name))
}
