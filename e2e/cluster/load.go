package main

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// peak tells the largest RSS so far of a container's process. It fails if that
// was restarted since before, by the kernel's OOM killer or otherwise.
func (t *test) peak(before *pod, container, program string) string {
	p := theOnly(t)
	t.wantRestarts(before, p)
	return fmt.Sprintf("%s: RSS at most %d MiB", container, must(t.process(p, container, program).NewStatus())(t).VmHWM>>20)
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
			t.ask(t.client, url, proxytest.Message)
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
			switch a := must(proxytest.Ask(t.client, t.request(url, body)))(t); {
			case a.Text == strconv.Itoa(size):
				uploads.Add(1)
				tries = 0
			case a.StatusCode == http.StatusRequestTimeout && tries < 2:
				repeated.Add(1)
				tries++
			default:
				t.fatalf("status %d, %v: %s", a.StatusCode, a.Err, a.Text)
			}
		}
	})
	took := time.Since(start).Seconds()
	t.report("%d uploads in %.0f s, %d repeated: %.1f MB/s; %s; %s", uploads.Load(), took, repeated.Load(),
		float64(uploads.Load()*size)/took/1e6, t.peak(before, "tailscaled", "tailscaled"), t.peak(before, "proxy", name))
}

// thousandStreams keeps a thousand event streams open together before any may end. They come to the pod past the sidecar, whose CPU
// limit would be what is seen.
func thousandStreams(t *test) {
	const streams, events = 1000, 20
	o := t.overlay
	o.config = []string{"require_tailnet = true", "require_tailnet = false"}
	t.cleanup(t.heal)
	t.restart(o)
	p := t.awaitReady()
	var begun atomic.Int64
	all := make(chan struct{})
	t.upstream.Handle(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, proxytest.Event)
		fakeanthropic.Flush(w)
		if begun.Add(1) == streams {
			close(all)
		}
		select {
		case <-all:
			io.WriteString(w, strings.Repeat(proxytest.Event, events-1))
		case <-r.Context().Done():
		}
	}))
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: streams}}
	t.cleanup(client.CloseIdleConnections)
	start := time.Now()
	t.together(streams, func(t *test) {
		if got := t.ask(client, "http://"+p.Status.PodIP+":8080"+messages, proxytest.Stream); got != strings.Repeat(proxytest.Event, events) {
			t.fatalf("a stream is %d bytes long", len(got))
		}
	})
	t.report("%d streams open at once, all complete after %.1f s; %s", streams, time.Since(start).Seconds(), t.peak(p, "proxy", name))
}
