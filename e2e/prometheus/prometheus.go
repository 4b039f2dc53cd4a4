// Package prometheus runs a real Prometheus on loopback: Debian's package prometheus has it.
package prometheus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/api"
	v1 "github.com/prometheus/client_golang/api/prometheus/v1"
	"github.com/prometheus/common/model"

	"anthropic-oauth-proxy/e2e/proxytest"
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
	api v1.API
	cmd *exec.Cmd
}

// Start runs Prometheus with its files in dir. discovery is the URL of an HTTP service discovery, which also gives the label
// job: Prometheus' own discovery in Kubernetes is not in every build, nor in Debian's.
func Start(dir, discovery string, rules Rules) (*Server, error) {
	config := filepath.Join(dir, "prometheus.yaml")
	address, err := proxytest.FreeAddr()
	err = errors.Join(err, rules.Write(filepath.Join(dir, "rules.json")), os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.json]
scrape_configs:
  - job_name: discovered
    http_sd_configs: [{url: %q, refresh_interval: 1s}]
`, discovery), 0o644))
	if err != nil {
		return nil, err
	}
	client, err := api.NewClient(api.Config{Address: "http://" + address})
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "prometheus.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close() // the child has its own
	s := &Server{api: v1.NewAPI(client)}
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

// Query returns the series that an expression has now.
func (s *Server) Query(ctx context.Context, expr string) (model.Vector, error) {
	value, _, _, err := s.api.Query(ctx, expr, time.Time{})
	series, _ := value.(model.Vector)
	return series, err
}

// Await polls until an expression has a result. Errors count as none, as Prometheus takes a moment to start.
func (s *Server) Await(ctx context.Context, expr string) error {
	for {
		series, err := s.Query(ctx, expr)
		if err == nil && len(series) > 0 {
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
