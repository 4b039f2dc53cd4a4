package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealthBody: exactly the runbook's keys, in its order.
func TestHealthBody(t *testing.T) {
	connected := &tailnetState{hostname: "node-1", ip: "100.1.2.3", online: true}
	for _, row := range []struct {
		name   string
		state  *tailnetState // nil: without a tailnet
		status int
		want   string
	}{
		{name: "disabled", status: 200, want: `{"status":"healthy","tailnet":"disabled","uptime_seconds":90,"requests_served":3,"errors_total":1}`},
		{name: "connected", state: connected, status: 200,
			want: `{"status":"healthy","tailnet":"connected","tailnet_hostname":"node-1","tailnet_ip":"100.1.2.3","uptime_seconds":90,"requests_served":3,"errors_total":1}`},
		{name: "control lost", state: &tailnetState{hostname: "node-1", ip: "100.1.2.3"}, status: 200,
			want: `{"status":"healthy","tailnet":"connected","tailnet_hostname":"node-1","tailnet_ip":"100.1.2.3","uptime_seconds":90,"requests_served":3,"errors_total":1}`},
		{name: "not connected", state: &tailnetState{problem: &problem{tailnetConnect, "x"}, hostname: "node-1", ip: "100.1.2.3"}, status: 503,
			want: `{"status":"degraded","tailnet":"not_connected","uptime_seconds":90,"requests_served":3,"errors_total":1}`},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := localProxy(t)
				if row.state != nil {
					p.own.tailnet = newTailnet("/nowhere", "node-1", slog.New(slog.DiscardHandler))
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
		})
	}
}

// TestOwnEndpoints: GET and HEAD on exactly these paths, over a connection.
func TestOwnEndpoints(t *testing.T) {
	for _, row := range []struct {
		name         string
		method, path string
		status       int
		proxied      bool
	}{
		{name: "health", method: "GET", path: "/health", status: 200},
		{name: "health with a query", method: "GET", path: "/health?x", status: 200},
		{name: "live", method: "GET", path: "/livez", status: 200},
		{name: "metrics", method: "GET", path: "/metrics", status: 200},
		{name: "HEAD", method: "HEAD", path: "/health", status: 200},
		{name: "POST", method: "POST", path: "/health", status: 405},
		{name: "DELETE", method: "DELETE", path: "/metrics", status: 405},
		{name: "a slash more", method: "GET", path: "/health/", status: 418, proxied: true},
		{name: "a slash before", method: "GET", path: "//health", status: 418, proxied: true},
		{name: "escaped", method: "GET", path: "/%68ealth", status: 418, proxied: true},
		{name: "capital", method: "GET", path: "/Health", status: 418, proxied: true},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
				got := r.do(row.method, row.path, "")
				if got.status != row.status || got.err != nil {
					t.Fatalf("%+v, want status %d", got, row.status)
				}
				if n := r.proxy.metrics.requestsTotal(); (n > 0) != row.proxied {
					t.Errorf("%d proxied requests", n)
				}
				if allow := got.header.Get("Allow"); (allow == "GET, HEAD") != (row.status == 405) {
					t.Errorf("Allow: %s", allow)
				}
				if row.method == "HEAD" && (got.body != "" || got.header.Get("Content-Length") == "0") {
					t.Errorf("HEAD got the body %q and Content-Length %s", got.body, got.header.Get("Content-Length"))
				}
				if id := got.header.Get("X-Proxy-Request-Id"); len(id) != len("req_")+36 {
					t.Errorf("X-Proxy-Request-Id: %s", id)
				}
			})
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
		for path, want := range map[string]string{"/livez": `{"status":"alive"}`, "/health": "", "/metrics": ""} {
			got := r.do("GET", path, "")
			if got.status != 200 || got.took != 0 || want != "" && got.body != want {
				t.Errorf("%s: %+v", path, got)
			}
		}
		samples, _ := scrape(t, r.proxy.metrics)
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
	})
}
