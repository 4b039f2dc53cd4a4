package main

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	plainBody    = `{"model":"claude-fake-1","max_tokens":64,"messages":[{"role":"user","content":"hello"}]}`
	streamedBody = `{"model":"claude-fake-1","max_tokens":64,"stream":true,"messages":[{"role":"user","content":"hello"}]}`
	// messages is where both go.
	messages = "/v1/messages"
)

// send sends a request as an OAuth client does: a POST if it has a body.
func (t *test) send(client *http.Client, url, body string) *http.Response {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(t.ctx, method, url, strings.NewReader(body))
	t.check(err)
	req.Header.Set("Authorization", "Bearer sk-ant-oat-testonly")
	req.Header.Set("Content-Type", "application/json")
	resp := must(client.Do(req))(t)
	t.cleanup(func() { resp.Body.Close() })
	return resp
}

// exchange is send, with the whole answer.
func (t *test) exchange(client *http.Client, url, body string) (status int, answer string) {
	resp := t.send(client, url, body)
	defer resp.Body.Close()
	return resp.StatusCode, string(must(io.ReadAll(resp.Body))(t))
}

// ask is exchange, with a 200 or else a failure.
func (t *test) ask(client *http.Client, url, body string) (answer string) {
	status, answer := t.exchange(client, url, body)
	if status != http.StatusOK {
		t.fatalf("%s: status %d: %s", url, status, answer)
	}
	return answer
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
	t.ask(t.client, url, plainBody)
	start := time.Now()
	answer := t.ask(t.client, url, plainBody)
	t.report("%v", time.Since(start).Round(100*time.Microsecond))
	if !strings.Contains(answer, `"end_turn"`) {
		t.fatalf("the answer is no message: %s", answer)
	}
}
