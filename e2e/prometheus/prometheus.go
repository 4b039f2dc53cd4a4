// Package prometheus runs a real Prometheus on loopback: Debian's package prometheus has it.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Rules are the groups of a PrometheusRule's spec, with the times before alerts fire cut short.
type Rules []map[string]any

// Hurry makes every alert fire after two seconds, and returns the names of what is recorded.
func (r Rules) Hurry() (records []string) {
	for _, group := range r {
		for _, rule := range group["rules"].([]any) {
			rule := rule.(map[string]any)
			if record, ok := rule["record"].(string); ok {
				records = append(records, record)
			} else {
				rule["for"] = "2s"
			}
		}
	}
	return records
}

// A Server scrapes every second.
type Server struct {
	url string
	cmd *exec.Cmd
}

// Start runs Prometheus with its files in dir. discovery is the URL of an HTTP service discovery, which also gives the label
// job: Prometheus' own discovery in Kubernetes is not in every build, nor in Debian's.
func Start(dir, discovery string, rules Rules) (*Server, error) {
	text, err := json.Marshal(map[string]any{"groups": rules}) // JSON is YAML
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "prometheus.yaml")
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "rules.json"), text, 0o644),
		os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.json]
scrape_configs:
  - job_name: discovered
    http_sd_configs: [{url: %q, refresh_interval: 1s}]
`, discovery), 0o644))
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := listener.Addr().String()
	listener.Close()
	log, err := os.Create(filepath.Join(dir, "prometheus.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	s := &Server{url: "http://" + address}
	s.cmd = exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "tsdb"), "--web.listen-address="+address)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting Prometheus (Debian's package prometheus has it): %w", err)
	}
	return s, nil
}

// Close ends it.
func (s *Server) Close() error {
	if err := s.cmd.Process.Kill(); err != nil {
		return err
	}
	_ = s.cmd.Wait() // it was killed
	return nil
}

// Query returns how many series an expression has now, and the first as text.
func (s *Server) Query(ctx context.Context, expr string) (series int, first string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, "", err
	}
	var answer struct {
		Data struct{ Result []json.RawMessage }
	}
	if err := json.Unmarshal(body, &answer); err != nil || resp.StatusCode != http.StatusOK {
		return 0, "", fmt.Errorf("%s: status %d: %s", expr, resp.StatusCode, body)
	}
	if len(answer.Data.Result) == 0 {
		return 0, "", nil
	}
	return len(answer.Data.Result), string(answer.Data.Result[0]), nil
}

// Await polls until an expression has a result. Errors count as none, as Prometheus takes a moment to start.
func (s *Server) Await(ctx context.Context, expr string) error {
	for {
		n, _, err := s.Query(ctx, expr)
		if err == nil && n > 0 {
			return nil
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("%s has no result: %w", expr, errors.Join(err, ctx.Err()))
		}
	}
}

// AwaitScrape returns after a successful scrape, of a target with these labels, that began later than now.
func (s *Server) AwaitScrape(ctx context.Context, labels string) error {
	now := float64(time.Now().UnixMilli()) / 1e3
	return s.Await(ctx, fmt.Sprintf(`up{%s} == 1 and timestamp(up{%s}) > %.3f`, labels, labels, now))
}
