package main

import (
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

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
