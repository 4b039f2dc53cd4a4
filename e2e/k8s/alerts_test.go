//go:build promtool

package k8s

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/prometheus"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestAlertsOfRealPrograms has a real Prometheus scrape two real proxies to which the faults are done that need no tailnet;
// e2e/cluster has the others. None of the alerts fires before.
func TestAlertsOfRealPrograms(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	up := proxytest.NewScene(t).API(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status, err := strconv.Atoi(r.URL.Path[1:]); err == nil {
			w.WriteHeader(status)
		} else if r.URL.Path == "/hold" {
			<-ctx.Done()
		} else if r.URL.Path == "/slow" {
			time.Sleep(32 * time.Second)
		} else if r.URL.Path == "/cut" {
			panic(http.ErrAbortHandler)
		}
	}))
	roomy := proxytest.Local(t, up.URL, "[proxy]\nbody_memory_mb = 300\n", up.Env()...)
	// Its memory limit carries 80 connections, it is at work on 4 requests at a time, and nobody reads its log.
	unread, log, err := os.Pipe()
	proxytest.Check(t, err)
	defer unread.Close()
	narrow := proxytest.Launch(t, proxytest.Options{
		Args: proxytest.Serve(up.URL), Env: append(up.Env(), "GOMEMLIMIT=83MiB"), Stdout: log, Config: "[proxy]\nmax_connections = 4\n",
	})
	log.Close() // the child has its own
	proxytest.Check(t, narrow.WaitListening(proxytest.Timeout))

	discovery := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		const target = `{"targets": [%q], "labels": {"job": "anthropic-oauth-proxy", "namespace": "anthropic-oauth-proxy", "pod": %q}}`
		fmt.Fprintf(w, "["+target+","+target+"]", roomy.Addr(), "roomy", narrow.Addr(), "narrow")
	}))
	defer discovery.Close()
	server := proxytest.Must(prometheus.Start(t.TempDir(), discovery.URL, rules(t)))(t)
	defer server.Close()

	post := func(p *proxytest.Proxy, path string, times, size int) {
		for range times {
			if resp, err := http.Post(p.URL()+path, "", strings.NewReader(strings.Repeat("x", size))); err == nil {
				resp.Body.Close()
			}
		}
	}
	// What a fleet has of them every day, for longer than it takes an alert to fire.
	post(roomy, "/200", 40, 1)
	failures := []string{"/429", "/529", "/500"}
	for _, path := range failures {
		post(roomy, path, 1, 1)
	}
	scraped := func() {
		proxytest.Check(t, server.AwaitScrape(ctx, `pod="roomy"`))
		proxytest.Check(t, server.AwaitScrape(ctx, `pod="narrow"`))
	}
	scraped()
	// A Prometheus that just started has no figures yet, and on a loaded machine for so long that this alert rightly fires.
	proxytest.Check(t, server.Await(ctx, `absent(ALERTS{alertname="AnthropicProxyScrapeMissing"})`))
	for range 3 {
		scraped()
		if alerts, err := server.Query(ctx, "ALERTS"); len(alerts) > 0 || err != nil {
			t.Fatalf("before any fault: %v, %v", err, alerts)
		}
	}

	for range 5 {
		go post(roomy, "/slow", 1, 1)
	}
	for _, path := range append(failures, "/cut") {
		post(roomy, path, 40, 1)
	}
	for range 15 {
		go post(roomy, "/hold", 1, 10<<20)
	}
	for range 75 {
		proxytest.Must(proxytest.Dial(ctx, narrow.Addr(), nil))(t)
	}
	var flood sync.WaitGroup // lines of more than 1 MiB and a pipe
	for range 4 {
		flood.Go(func() { post(narrow, "/200"+strings.Repeat("/", 300), 1000, 0) })
	}
	flood.Wait()
	for range 5 {
		go post(narrow, "/hold", 1, 1)
	}
	fires := func(pod string, alerts ...string) {
		for _, alert := range alerts {
			if err := server.Await(ctx, fmt.Sprintf(`ALERTS{alertname="AnthropicProxy%s",alertstate="firing",pod=%q}`, alert, pod)); err != nil {
				t.Error(err)
			}
		}
	}
	fires("narrow", "Connections", "LogLinesDropped", "Queue") // first, as idle connections are closed after a while
	fires("roomy", "Throttled", "Overloaded", "ServerErrors", "Memory", "UpstreamErrors", "Slow")
	proxytest.Check(t, narrow.Stop())
	fires("narrow", "ScrapeMissing")
}
