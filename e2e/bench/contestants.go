package main

import (
	"embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/template"

	"anthropic-oauth-proxy/e2e/proxytest"
)

const (
	// workers is how many threads or processes each contestant works with, also
	// where there are more cores.
	workers = 2
	// maxConnections is what each contestant is told to expect, above the largest
	// workload.
	maxConnections = 2500
	// maxFiles is what a process of the run may have open: both ends of the 2,000
	// streams, twice over.
	maxFiles = 16384
	// beta is what each contestant has to add to the client's betas.
	beta = "oauth-2025-04-20"
	// goMemLimit is the proxy's GOMEMLIMIT. It carries the connections of the largest
	// workload, twice what the Kubernetes manifests' does.
	goMemLimit = "256MiB"
)

// The contestants that figures and limits name.
const (
	ours           = "proxy"
	baseline       = "baseline"
	silent         = "proxy-silent"
	limited        = "proxy-500m"
	limitedOne     = "proxy-500m-procs1"
	nginx          = "nginx"
	haproxy        = "haproxy"
	haproxyNoDelay = "haproxy-nodelay"
	caddy          = "caddy"
	reverseProxy   = "reverseproxy"
	direct         = "direct"
)

// A contestant is one way for requests to get to the upstream.
type contestant struct {
	name   string
	binary string // found, or built, by resolve; empty for direct

	optional bool // only measured when asked for
	quota    bool // works with half a processor, see quota.go

	debian string                 // the package that has the binary
	config string                 // the template of its configuration
	args   func(s setup) []string // of the binary
	env    []string               // all of its environment
}

// setup is what a contestant's configuration can refer to.
type setup struct {
	Dir         string // of its own, removed at the end
	Config      string // the file, in Dir
	Listen      string // where to listen, 127.0.0.1:PORT
	Upstream    string // 127.0.0.1:PORT of the upstream
	ServerName  string // of the upstream's certificate
	CAFile      string // that the upstream's certificate is to be verified with
	Beta        string
	Workers     int
	Connections int
	Files       int
	NoDelay     bool // HAProxy's option http-no-delay
}

// goEnv is for contestants written in Go.
var goEnv = []string{fmt.Sprintf("GOMAXPROCS=%d", workers)}

// proxyConfig is the template of the proxy's configuration.
const proxyConfig = "proxy.toml.tmpl"

// all returns the contestants in the order of the tables. Those of other people
// come from Debian.
func all() []contestant {
	proxyArgs := func(s setup) []string { return []string{"-local", "-listen", s.Listen, "-config", s.Config} }
	haproxyArgs := func(s setup) []string { return []string{"-db", "-q", "-f", s.Config} }
	// As in Kubernetes; start adds the upstream's authority.
	proxyEnv := func(more ...string) []string {
		return append([]string{"LOG_LEVEL=info", "GOMEMLIMIT=" + goMemLimit}, more...)
	}
	return []contestant{
		{name: ours, config: proxyConfig, env: proxyEnv(goEnv...), args: proxyArgs},
		{name: silent, config: proxyConfig, env: proxyEnv(goEnv[0], "LOG_LEVEL=error"), args: proxyArgs, optional: true},
		{name: limited, config: proxyConfig, env: proxyEnv(), args: proxyArgs, quota: true},
		{name: limitedOne, config: proxyConfig, env: proxyEnv("GOMAXPROCS=1"), args: proxyArgs, quota: true},
		{name: baseline, config: proxyConfig, env: proxyEnv(goEnv...), args: proxyArgs},
		{name: nginx, debian: "nginx-light", config: "nginx.conf.tmpl", args: func(s setup) []string {
			return []string{"-p", s.Dir, "-e", "stderr", "-c", s.Config}
		}},
		{name: haproxy, debian: "haproxy", config: "haproxy.cfg.tmpl", args: haproxyArgs},
		{name: haproxyNoDelay, debian: "haproxy", config: "haproxy.cfg.tmpl", args: haproxyArgs},
		{name: caddy, debian: "caddy", config: "Caddyfile.tmpl", env: goEnv, args: func(s setup) []string {
			return []string{"run", "--adapter", "caddyfile", "--config", s.Config}
		}},
		{name: reverseProxy, env: goEnv, args: func(s setup) []string {
			return []string{reverseProxyMode, "-listen", s.Listen, "-upstream", s.Upstream, "-server-name", s.ServerName}
		}},
		{name: direct},
	}
}

func contestantNames() []string {
	var names []string
	for _, c := range all() {
		names = append(names, c.name)
	}
	return names
}

// resolve returns the contestants that o asks for, with their binaries. It
// reports all that are missing at once.
func resolve(o options) ([]contestant, error) {
	var found []contestant
	var missing []error
	for _, c := range all() {
		if o.only != nil && !slices.Contains(o.only, c.name) || o.only == nil && c.optional || c.name == baseline && o.baseline == "" ||
			!slices.ContainsFunc(chosenWorkloads(o), func(w workload) bool { return isQuota(w.name) == c.quota }) {
			continue
		}
		var err error
		switch c.name {
		case direct:
		case ours, silent, limited, limitedOne:
			if c.binary = o.binary; c.binary == "" {
				c.binary, err = proxytest.Build()
			}
			if c.quota && err == nil {
				err = tryQuota()
			}
		case baseline:
			c.binary = o.baseline
		case reverseProxy:
			c.binary, err = os.Executable()
		default:
			c.binary, err = findDebian(strings.TrimSuffix(c.name, "-nodelay"), c.debian)
		}
		if err == nil && c.binary != "" {
			c.binary, err = filepath.Abs(c.binary)
		}
		missing = append(missing, err)
		found = append(found, c)
	}
	if found == nil {
		return nil, errors.New("none of the chosen contestants does the chosen work")
	}
	return found, errors.Join(missing...)
}

// findDebian looks for a program that Debian packages, also where it puts
// daemons, which is not in everyone's path.
func findDebian(program, pkg string) (string, error) {
	if path, err := exec.LookPath(program); err == nil {
		return path, nil
	}
	if path := filepath.Join("/usr/sbin", program); isFile(path) {
		return path, nil
	}
	return "", fmt.Errorf("%s is not installed: apt-get install --no-install-recommends %s (or leave it out with -only)", program, pkg)
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

//go:embed configs
var configs embed.FS

var templates = template.Must(template.New("").Option("missingkey=error").ParseFS(configs, "configs/*.tmpl"))

// configure writes c's configuration, if it has one, into s.Dir.
func configure(c contestant, s *setup) error {
	s.NoDelay = c.name == haproxyNoDelay
	if c.config == "" {
		return nil
	}
	s.Config = filepath.Join(s.Dir, strings.TrimSuffix(c.config, ".tmpl"))
	f, err := os.Create(s.Config)
	if err != nil {
		return fmt.Errorf("writing the configuration: %w", err)
	}
	return errors.Join(templates.ExecuteTemplate(f, c.config, s), f.Close())
}
