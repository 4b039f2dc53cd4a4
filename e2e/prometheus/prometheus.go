// Package prometheus runs a real Prometheus on loopback: Debian's package prometheus has it.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Rules are the groups of a PrometheusRule's spec.
type Rules []struct {
	Name  string `json:"name"`
	Rules []Rule `json:"rules"`
}

// A Rule records something or alerts.
type Rule struct {
	Record      string            `json:"record,omitempty"`
	Alert       string            `json:"alert,omitempty"`
	Expr        string            `json:"expr"`
	For         string            `json:"for,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Hurry makes every alert fire after two seconds, and returns the names of what is recorded.
func (r Rules) Hurry() (records []string) {
	for _, group := range r {
		for i, rule := range group.Rules {
			if rule.Record != "" {
				records = append(records, rule.Record)
			} else {
				group.Rules[i].For = "2s"
			}
		}
	}
	return records
}

// Write writes the rules to a file that Prometheus and promtool read.
func (r Rules) Write(file string) error {
	text, err := json.Marshal(map[string]any{"groups": r}) // JSON is YAML
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// A Server scrapes every second.
type Server struct {
	url string
	cmd *exec.Cmd
}

// Start runs Prometheus with its files in dir. discovery is the URL of an HTTP service discovery, which also gives the label
// job: Prometheus' own discovery in Kubernetes is not in every build, nor in Debian's.
func Start(dir, discovery string, rules Rules) (*Server, error) {
	config := filepath.Join(dir, "prometheus.yaml")
	err := errors.Join(rules.Write(filepath.Join(dir, "rules.json")), os.WriteFile(config, fmt.Appendf(nil, `
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
	err := s.cmd.Process.Kill()
	_ = s.cmd.Wait() // it was killed
	return err
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
	var answer struct {
		Error string
		Data  struct{ Result []json.RawMessage }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || resp.StatusCode != http.StatusOK {
		return 0, "", fmt.Errorf("%s: status %d: %s, %v", expr, resp.StatusCode, answer.Error, err)
	}
	if len(answer.Data.Result) > 0 {
		first = string(answer.Data.Result[0])
	}
	return len(answer.Data.Result), first, nil
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
