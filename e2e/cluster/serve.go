package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

const (
	plainBody    = `{"model":"claude-fake-1","max_tokens":64,"messages":[{"role":"user","content":"hello"}]}`
	streamedBody = `{"model":"claude-fake-1","max_tokens":64,"stream":true,"messages":[{"role":"user","content":"hello"}]}`
)

// tailnetURL waits for the pod and returns its tailnet address.
func (w *world) tailnetURL(ctx context.Context) (string, error) {
	p, err := w.kube.awaitReady(ctx)
	if err != nil {
		return "", err
	}
	return tailnetURL(ctx, p, name)
}

// tailnetURL asks a pod for its tailnet address, and wants its node to have that name.
func tailnetURL(ctx context.Context, p *pod, wantName string) (string, error) {
	_, body, err := get(ctx, p.own("/health"))
	if err != nil {
		return "", err
	}
	var health struct {
		IP       string `json:"tailnet_ip"`
		Hostname string `json:"tailnet_hostname"`
	}
	if err := json.Unmarshal([]byte(body), &health); err != nil {
		return "", fmt.Errorf("reading /health: %w: %s", err, body)
	}
	if health.Hostname != wantName {
		return "", fmt.Errorf("the node is called %q, not %q", health.Hostname, wantName)
	}
	return "http://" + health.IP + ":8080", nil
}

// get asks past the tailnet.
func get(ctx context.Context, url string) (status int, body string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// post sends a Messages request as an OAuth client does.
func post(ctx context.Context, client *http.Client, base, body string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base+"/v1/messages", strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer sk-ant-oat-testonly")
	req.Header.Set("Content-Type", "application/json")
	return client.Do(req)
}

// ask is post, with the whole answer, which must be a 200.
func ask(ctx context.Context, client *http.Client, base, body string) (string, error) {
	resp, err := post(ctx, client, base, body)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", resp.StatusCode, text)
	}
	return string(text), err
}

// askTailnet is ask from the laptop, after awaiting the pod. A first packet on a
// path that has just been found may be lost, so the time is the second's.
func (w *world) askTailnet(ctx context.Context, body string) (answer string, took time.Duration, err error) {
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", 0, err
	}
	if _, err := ask(ctx, w.client, base, body); err != nil {
		return "", 0, err
	}
	start := time.Now()
	answer, err = ask(ctx, w.client, base, body)
	return answer, time.Since(start).Round(100 * time.Microsecond), err
}

func plainRequest(ctx context.Context, w *world) (string, error) {
	answer, took, err := w.askTailnet(ctx, plainBody)
	if err != nil {
		return "", err
	}
	if !strings.Contains(answer, `"end_turn"`) {
		return "", fmt.Errorf("the answer is no message: %s", answer)
	}
	return fmt.Sprintf("%v", took), nil
}

// streamedRequest wants each event at its time, not all at the end.
func streamedRequest(ctx context.Context, w *world) (string, error) {
	const interval = 100 * time.Millisecond
	w.upstream.Handle(fakeanthropic.API{Deltas: 10, Interval: interval})
	defer w.upstream.Handle(nil)
	base, err := w.tailnetURL(ctx)
	if err != nil {
		return "", err
	}
	resp, err := post(ctx, w.client, base, streamedBody)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var arrived []time.Time
	err = events(resp.Body, func(kind string) {
		if kind == "content_block_delta" {
			arrived = append(arrived, time.Now())
		}
	})
	if err != nil {
		return "", err
	}
	if len(arrived) != 10 {
		return "", fmt.Errorf("%d of 10 deltas arrived", len(arrived))
	}
	spread := arrived[9].Sub(arrived[0])
	if spread < 5*interval {
		return "", fmt.Errorf("10 deltas sent over %v arrived within %v: they were held back", 9*interval, spread)
	}
	return fmt.Sprintf("10 deltas sent over %v arrived over %v", 9*interval, spread.Round(time.Millisecond)), nil
}

// identity looks for the laptop and its owner in the lines of its requests.
func identity(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	user, err := w.laptop.User(ctx)
	if err != nil {
		return "", err
	}
	_, err = w.kube.awaitLog(ctx, p, "proxy", `"request completed"`, `"tailnet_node":"laptop`, `"tailnet_user":"`+user+`"`)
	return user, err
}

// insideCaller comes to the pod's own address, as any pod of the cluster can
// where no NetworkPolicy is enforced.
func insideCaller(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	for path, want := range map[string]int{
		"/v1/models": http.StatusForbidden,
		"/health":    http.StatusOK,
		"/metrics":   http.StatusOK,
	} {
		status, body, err := get(ctx, p.url(path))
		if err != nil {
			return "", err
		}
		if status != want {
			return "", fmt.Errorf("%s: status %d, not %d: %s", path, status, want, body)
		}
	}
	return "", nil
}

// resolver reads the pod's /etc/resolv.conf.
func resolver(ctx context.Context, w *world) (string, error) {
	p, err := w.kube.pod(ctx)
	if err != nil {
		return "", err
	}
	pid, err := process(p, "proxy", name)
	if err != nil {
		return "", err
	}
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "root", "etc", "resolv.conf"))
	if err != nil {
		return "", err
	}
	options, _ := findLine(string(text), "options")
	got := strings.Fields(options)
	for _, want := range []string{"ndots:1", "timeout:2", "attempts:3"} {
		if !slices.Contains(got, want) {
			return "", fmt.Errorf("no %s in %s", want, text)
		}
	}
	return options, nil
}
