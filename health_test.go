package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealthBody: exactly the runbook's keys, in its order.
func TestHealthBody(t *testing.T) {
	const counts = `"uptime_seconds":90,"requests_served":3,"errors_total":1}`
	const connected = `{"status":"healthy","tailnet":"connected","tailnet_hostname":"node-1","tailnet_ip":"100.1.2.3",` + counts
	for _, row := range []struct {
		name   string
		state  *tailnetState // nil: without a tailnet
		status int
		want   string
	}{
		{name: "disabled", status: 200, want: `{"status":"healthy","tailnet":"disabled",` + counts},
		{name: "connected", state: &tailnetState{hostname: "node-1", ip: "100.1.2.3", online: true}, status: 200, want: connected},
		{name: "control lost", state: &tailnetState{hostname: "node-1", ip: "100.1.2.3"}, status: 200, want: connected},
		{name: "not connected", state: &tailnetState{problem: &problem{tailnetConnect, "x"}, hostname: "node-1", ip: "100.1.2.3"}, status: 503,
			want: `{"status":"degraded","tailnet":"not_connected",` + counts},
	} {
		inBubble(t, row.name, func(t *testing.T) {
			p := localProxy(t)
			if row.state != nil {
				p.own.tailnet = newTailnet(&config{socket: "/nowhere", hostname: "node-1"}, slog.New(slog.DiscardHandler))
				p.own.tailnet.publish(row.state)
			}
			time.Sleep(90*time.Second + 999*time.Millisecond)
			p.metrics.requestDone(200, "POST", 0)
			p.metrics.requestDone(499, "POST", 0)
			p.metrics.requestDone(502, "POST", 0)
			p.metrics.upstreamError(typeConnection)
			status, contentType, body := p.own.health()
			if status != row.status || contentType != "application/json" || string(body) != row.want {
				t.Errorf("%d %s\n%s\nwant %d\n%s", status, contentType, body, row.status, row.want)
			}
		})
	}
}

// TestOwnEndpointsAnswerBusyProxy: neither a full house nor a body that does not come keeps a probe waiting.
func TestOwnEndpointsAnswerBusyProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "max_connections = 1", never)
		go r.post()
		go r.post()
		synctest.Wait()
		types := map[string]string{"/livez": "application/json", "/health": "application/json", "/metrics": "text/plain; version=0.0.4; charset=utf-8"}
		for path, want := range map[string]string{"/livez": `{"status":"alive"}`, "/health": "", "/metrics": ""} {
			got := r.do("GET", path, "")
			if contentType := got.header.Get("Content-Type"); contentType != types[path] {
				t.Errorf("%s has the type %s", path, contentType)
			}
			if got.status != 200 || got.took != 0 || got.header.Get(requestIDHeader) == "" || want != "" && got.body != want {
				t.Errorf("%s: %+v", path, got)
			}
		}
		if got := r.do("POST", "/health", ""); got.status != 405 || got.header.Get("Allow") != "GET, HEAD" || got.header.Get("X-Proxy-Request-Id") == "" {
			t.Errorf("a method that is not ours: %+v", got)
		}
		if got := r.do("HEAD", "/health?x", ""); got.status != 200 || got.body != "" || got.header.Get("Content-Length") == "0" {
			t.Errorf("HEAD: %+v", got)
		}
		samples := samplesOf(t, r.proxy.metrics.page())
		if samples["proxy_requests_in_flight"] != 1 || samples["proxy_requests_queued"] != 1 {
			t.Errorf("%v in flight, %v queued; want 1 and 1", samples["proxy_requests_in_flight"], samples["proxy_requests_queued"])
		}
		stalled := r.dialRaw()
		go stalled.send("GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
		got := stalled.answer()
		var h health
		if err := json.Unmarshal([]byte(got.body), &h); err != nil || got.took != 0 || !got.last {
			t.Errorf("a probe whose body does not come: %+v, %v", got, err)
		}
		if _, err := stalled.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("its connection goes on: %v", err)
		}
		if waited := time.Since(stalled.start); waited > 2*time.Second {
			t.Errorf("its connection was closed only after %v", waited)
		}
		for r.clients.connections() < rigConnections {
			go r.dialRaw().send("POST / HTTP/1.1\r\nHost: x\r\n\r\n")
			synctest.Wait()
		}
		r.front = r.probes
		for range 2 * healthConnections { // that say nothing: each idle for a second gives way to a newer one
			r.dialRaw()
			time.Sleep(idleGrace)
		}
		for path, status := range map[string]int{"/livez": 200, "/health": 200, "/metrics": 200, "/v1/messages": 404} {
			probe := r.dialRaw()
			go probe.send("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
			if got := probe.answer(); got.status != status || got.took != 0 || got.header.Get(requestIDHeader) == "" {
				t.Errorf("%s on health_addr: %+v", path, got)
			}
		}
		if n := r.clients.connections(); n != rigConnections {
			t.Errorf("clients have %d connections left, want all %d", n, rigConnections)
		}
	})
}
