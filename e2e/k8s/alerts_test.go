//go:build promtool

package k8s

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/prometheus"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestAlertsOfRealPrograms has a real Prometheus scrape two real proxies to which the faults are done that need no cluster;
// e2e/cluster has the others. None of the alerts fires before.
func TestAlertsOfRealPrograms(t *testing.T) {
	hold := make(chan struct{})
	up, err := fakeanthropic.Start(fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if status, err := strconv.Atoi(strings.Trim(r.URL.Path, "/")); err == nil {
			w.WriteHeader(status)
		} else if r.URL.Path == "/hold" {
			<-hold
		}
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	defer close(hold)
	roomy := proxytest.Local(t, up.URL, "[proxy]\nbody_memory_mb = 300\n", up.Env()...)
	narrow := narrowProxy(t, up)

	var spec struct {
		Spec struct{ Groups prometheus.Rules }
	}
	readYAML(t, "k8s/components/monitoring/prometheusrule.yaml", &spec)
	spec.Spec.Groups.Hurry()
	targets := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		type object = map[string]any
		var all []object
		for pod, p := range map[string]*proxytest.Proxy{"roomy": roomy, "narrow": narrow} {
			all = append(all, object{"targets": []string{p.Addr()}, "labels": object{"job": name, "namespace": name, "pod": pod}})
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(all)
	}))
	defer targets.Close()
	server, err := prometheus.Start(t.TempDir(), targets.URL, spec.Spec.Groups)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	scraped := func() {
		for _, pod := range []string{"roomy", "narrow"} {
			if err := server.AwaitScrape(ctx, fmt.Sprintf("pod=%q", pod)); err != nil {
				t.Fatal(err)
			}
		}
	}

	do := func(p *proxytest.Proxy, path string, body int) {
		resp, err := http.Post(p.URL()+path, "application/json", strings.NewReader(strings.Repeat("x", body)))
		if err == nil {
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}
	statuses := []string{"/200", "/429", "/529", "/500"}
	for range 40 { // what a fleet has of them every day
		do(roomy, "/200", 1)
	}
	for _, path := range statuses {
		do(roomy, path, 1)
	}
	scraped()
	time.Sleep(3 * time.Second)
	scraped()
	if n, first, err := server.Query(ctx, "ALERTS"); n > 0 || err != nil {
		t.Fatalf("before any fault: %v, %s", err, first)
	}

	for range 20 {
		for _, path := range statuses {
			do(roomy, path, 1)
		}
	}
	for range 15 {
		go do(roomy, "/hold", 10<<20)
	}
	for range 75 {
		conn, err := net.Dial("tcp", narrow.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	var flood sync.WaitGroup
	for range 4 {
		flood.Go(func() {
			for range 1000 { // lines of more than 1 MiB and a pipe
				do(narrow, "/200"+strings.Repeat("/", 300), 0)
			}
		})
	}
	flood.Wait()
	for alert, pod := range map[string]string{
		"Throttled": "roomy", "Overloaded": "roomy", "ServerErrors": "roomy", "Memory": "roomy",
		"Connections": "narrow", "LogLinesDropped": "narrow",
	} {
		if err := server.Await(ctx, fmt.Sprintf(`ALERTS{alertname="AnthropicProxy%s", alertstate="firing", pod=%q}`, alert, pod)); err != nil {
			t.Error(err)
		}
	}
}

// narrowProxy starts a proxy with a memory limit that carries 80 connections, and whose log nobody reads.
func narrowProxy(t *testing.T, up *fakeanthropic.Server) *proxytest.Proxy {
	t.Helper()
	binary, err := proxytest.Build()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	pipe, script := filepath.Join(dir, "log"), filepath.Join(dir, "proxy")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nexec %s \"$@\" >%s\n", binary, pipe), 0o700); err != nil {
		t.Fatal(err)
	}
	p := proxytest.Launch(t, proxytest.Options{
		Binary: script,
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", up.URL},
		Env:    append(up.Env(), "GOMEMLIMIT=83MiB"),
	})
	if err := p.WaitListening(proxytest.Timeout); err != nil {
		t.Fatal(err)
	}
	return p
}
