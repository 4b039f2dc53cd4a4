package main

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealthBody: exactly the runbook's keys, in its order.
func TestHealthBody(t *testing.T) {
	const counts = `"uptime_seconds":90,"requests_served":3,"errors_total":1}`
	const connected = `200 application/json {"status":"healthy","tailnet":"connected","tailnet_hostname":"node-1","tailnet_ip":"100.1.2.3",` + counts
	type row struct {
		state *tailnetState // nil: without a tailnet
		want  string
	}
	inBubbles(t, map[string]row{
		"disabled":      {want: `200 application/json {"status":"healthy","tailnet":"disabled",` + counts},
		"connected":     {state: &tailnetState{hostname: "node-1", ip: "100.1.2.3", online: true}, want: connected},
		"control lost":  {state: connectedState, want: connected},
		"not connected": {state: &tailnetState{problem: &problem{tailnetConnect, "x"}, hostname: "node-1", ip: "100.1.2.3"}, want: `503 application/json {"status":"degraded","tailnet":"not_connected",` + counts},
	}, func(t *testing.T, row row) {
		p := (&records{Requests: []recorded{{Status: 200}, {Status: 499}, {Status: 502}}, Errors: []errorType{typeConnection}}).proxy()
		if row.state != nil {
			p.own.tailnet, _ = newTestTailnet()
			p.own.tailnet.publish(row.state)
		}
		time.Sleep(90*time.Second + 999*time.Millisecond)
		status, contentType, body := p.own.health()
		equal(t, "the answer", fmt.Sprint(status, " ", contentType, " ", string(body)), row.want)
	})
}

// TestOwnEndpointsAnswerBusyProxy: neither a full house nor a body that does not come keeps a probe waiting.
func TestOwnEndpointsAnswerBusyProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "max_connections = 1", never)
		go r.post()
		go r.post()
		synctest.Wait()
		for path, want := range map[string]struct{ contentType, body string }{
			"/livez":   {"application/json", `{"status":"alive"}`},
			"/health":  {"application/json", `{"status":"healthy","tailnet":"disabled","uptime_seconds":0,"requests_served":0,"errors_total":0}`},
			"/metrics": {"text/plain; version=0.0.4; charset=utf-8", "# HELP"},
		} {
			got := r.do("GET", path, "")
			got.expect(t, "200 after 0s")
			equal(t, path+" has the type", got.header.Get("Content-Type"), want.contentType)
			holds(t, got.header.Get(requestIDHeader) != "" && strings.HasPrefix(got.body, want.body), "%s: %+v", path, got)
		}
		wrong := r.do("POST", "/health", "")
		holds(t, wrong.status == 405 && wrong.header.Get("Allow") == "GET, HEAD" && wrong.header.Get("X-Proxy-Request-Id") != "", "a method that is not ours: %+v", wrong)
		head := r.do("HEAD", "/health?x", "")
		holds(t, head.status == 200 && head.body == "" && head.header.Get("Content-Length") != "0", "HEAD: %+v", head)
		samples := samplesOf(t, r.proxy.metrics.page())
		equal(t, "in flight and queued", []float64{samples["proxy_requests_in_flight"], samples["proxy_requests_queued"]}, []float64{1, 1})
		stalled := r.dialRaw()
		go stalled.send("GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n")
		stalled.answer().expect(t, "200 after 0s, last")
		_, err := stalled.Read(make([]byte, 1))
		equal(t, "the end of its connection", err, io.EOF)
		holds(t, time.Since(stalled.start) <= 2*time.Second, "its connection was closed only after %v", time.Since(stalled.start))
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
			got := r.ask("GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n")
			holds(t, got.status == status && got.took == 0 && got.header.Get(requestIDHeader) != "", "%s on health_addr: %+v", path, got)
		}
		equal(t, "connections that clients have", r.clients.connections(), rigConnections)
	})
}

// TestOwnEndpointsAskNobody: a probe takes no look-up of its caller, not even where callers must be known.
func TestOwnEndpointsAskNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", echo)
		tn, _ := followed(t, running, func(http.ResponseWriter, *http.Request) { t.Error("tailscaled is asked who calls") })
		synctest.Wait()
		r.proxy.tailnet, r.proxy.own.tailnet, r.proxy.cfg.requireTailnet = tn, tn, true
		for _, path := range []string{"/health", "/livez", "/metrics"} {
			r.do("GET", path, "").expect(t, "200 after 0s")
		}
		r.expectNothingLeft()
	})
}
