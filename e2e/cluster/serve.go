package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// messages is where Messages requests go.
const messages = "/v1/messages"

// request is one as an OAuth client sends it: a POST if it has a body.
func (t *test) request(url, body string) *http.Request {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	req := must(http.NewRequestWithContext(t.ctx, method, url, strings.NewReader(body)))(t)
	req.Header.Set("Authorization", "Bearer sk-ant-oat-testonly")
	req.Header.Set("Content-Type", "application/json")
	return req
}

// ask sends a request, and has a 200 or else a failure.
func (t *test) ask(client *http.Client, url, body string) (answer string) {
	a := must(proxytest.Ask(client, t.request(url, body)))(t)
	if a.StatusCode != http.StatusOK || a.Err != nil {
		t.fatalf("%s: status %d, %v: %s", url, a.StatusCode, a.Err, a.Text)
	}
	return a.Text
}

// address asks a pod for its tailnet address, and wants its node to have that name.
func (t *test) address(p *pod, wantName string) string {
	var health struct {
		IP       string `json:"tailnet_ip"`
		Hostname string `json:"tailnet_hostname"`
	}
	t.check(json.Unmarshal([]byte(t.ask(http.DefaultClient, p.own()+"/health", "")), &health))
	if health.Hostname != wantName {
		t.fatalf("the node is called %q, not %q", health.Hostname, wantName)
	}
	return "http://" + health.IP + ":8080"
}

// tailnetURL waits for the Deployment's pod and returns its tailnet address.
func (t *test) tailnetURL() string { return t.address(t.awaitReady(), name) }

// plainRequest tells the time of a second request, as the first packet on a path that has just been found may be lost.
func plainRequest(t *test) {
	url := t.tailnetURL() + messages
	t.ask(t.client, url, proxytest.Message)
	start := time.Now()
	answer := t.ask(t.client, url, proxytest.Message)
	t.report("%v", time.Since(start).Round(100*time.Microsecond))
	if !strings.Contains(answer, `"end_turn"`) {
		t.fatalf("the answer is no message: %s", answer)
	}
}
