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

// Rules are the groups of a PrometheusRule's spec. Each rule in them has "record" or "alert".
type Rules []struct {
	Name  string           `json:"name"`
	Rules []map[string]any `json:"rules"`
}

// Names are those of all rules that record, or of all that alert.
func (r Rules) Names(key string) (names []string) {
	for _, group := range r {
		for _, rule := range group.Rules {
			if name, ok := rule[key].(string); ok {
				names = append(names, name)
			}
		}
	}
	return names
}

// Write writes the rules to a file that Prometheus and promtool read.
func (r Rules) Write(file string) error {
	text, err := json.Marshal(map[string]any{"groups": r}) // JSON is YAML
	return errors.Join(err, os.WriteFile(file, text, 0o644))
}

// A Server scrapes every second.
type Server struct {
	api v1.API
	cmd *exec.Cmd
}

// Start runs Prometheus with its files in dir; every alert of the rules fires after two seconds. discovery is the URL of an HTTP
// service discovery, which also gives the label job: Prometheus' own discovery in Kubernetes is not in Debian's build.
func Start(dir, discovery string, rules Rules) (*Server, error) {
	for _, group := range rules {
		for _, rule := range group.Rules {
			if rule["alert"] != nil {
				rule["for"] = "2s"
			}
		}
	}
	config := filepath.Join(dir, "prometheus.yaml")
	address, err := proxytest.FreeAddr()
	client, clientErr := api.NewClient(api.Config{Address: "http://" + address})
	err = errors.Join(err, clientErr, rules.Write(filepath.Join(dir, "rules.json")), os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [rules.json]
scrape_configs:
  - job_name: discovered
    http_sd_configs: [{url: %q, refresh_interval: 1s}]
`, discovery), 0o644))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "tsdb"),
		"--web.listen-address="+address, "--log.level=error")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting Prometheus (Debian's package prometheus has it): %w", err)
	}
	return &Server{v1.NewAPI(client), cmd}, nil
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
