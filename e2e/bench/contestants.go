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

// What each contestant is told, in its own words.
const (
	beta           = "oauth-2025-04-20" // to be added to the client's betas
	workers        = 2                  // threads or processes, also where there are more cores
	maxConnections = 2500               // above the largest workload
	maxFiles       = 16384              // of a process: both ends of 2,000 streams, twice over
	quotaCPUs      = 0.5                // the CPU limit of the Kubernetes manifests
)

// The contestants.
const (
	ours           = "proxy"
	silent         = "proxy-silent"
	limited        = "proxy-500m"
	limitedOne     = "proxy-500m-procs1"
	baseline       = "baseline"
	nginx          = "nginx"
	haproxy        = "haproxy"
	haproxyNoDelay = "haproxy-nodelay"
	caddy          = "caddy"
	reverseProxy   = "reverseproxy"
	direct         = "direct" // to the upstream, without any proxy
)

// A contestant is one way for requests to get to the upstream.
type contestant struct {
	name     string
	find     func(o options) (binary string, err error) // nil for direct
	config   string                                     // its configuration, a template in configs
	args     string                                     // its command line, a template
	env      []string                                   // all of its environment, but for what start adds
	optional bool                                       // only measured when asked for
	quota    bool                                       // may use quotaCPUs
	binary   string                                     // as found by resolve
}

const (
	proxyConfig = "proxy.toml.tmpl"
	proxyArgs   = "-local -listen {{.Listen}} -config {{.Config}}"
	haproxyArgs = "-db -q -f {{.Config}}"
)

// contestants are all there are, in the order of the tables. Those of other people come from Debian.
var contestants = []contestant{
	{name: ours, find: current, config: proxyConfig, args: proxyArgs, env: proxyEnv(goProcs)},
	{name: silent, find: current, config: proxyConfig, args: proxyArgs, env: proxyEnv(goProcs, "LOG_LEVEL=error"), optional: true},
	{name: limited, find: current, config: proxyConfig, args: proxyArgs, env: proxyEnv(), quota: true},
	{name: limitedOne, find: current, config: proxyConfig, args: proxyArgs, env: proxyEnv("GOMAXPROCS=1"), quota: true},
	{name: baseline, find: older, config: proxyConfig, args: proxyArgs, env: proxyEnv(goProcs)},
	{name: nginx, find: debian("nginx", "nginx-light"), config: "nginx.conf.tmpl", args: "-p {{.Dir}} -e stderr -c {{.Config}}"},
	{name: haproxy, find: debian("haproxy", "haproxy"), config: "haproxy.cfg.tmpl", args: haproxyArgs},
	{name: haproxyNoDelay, find: debian("haproxy", "haproxy"), config: "haproxy.cfg.tmpl", args: haproxyArgs},
	{name: caddy, find: debian("caddy", "caddy"), config: "Caddyfile.tmpl", args: "run --adapter caddyfile --config {{.Config}}", env: []string{goProcs}},
	{name: reverseProxy, find: itself, args: reverseProxyMode + " {{.Listen}} {{.Upstream}}", env: []string{goProcs}},
	{name: direct},
}

// goProcs is for contestants written in Go.
var goProcs = fmt.Sprintf("GOMAXPROCS=%d", workers)

// proxyEnv is as in Kubernetes, but for twice the manifests' GOMEMLIMIT, which carries the connections of the largest workload.
func proxyEnv(more ...string) []string {
	return append([]string{"LOG_LEVEL=info", "GOMEMLIMIT=256MiB"}, more...)
}

func current(o options) (string, error) {
	if o.binary != "" {
		return o.binary, nil
	}
	return proxytest.Build()
}

func older(o options) (string, error) { return o.baseline, nil }
func itself(options) (string, error)  { return os.Executable() }

// debian returns what finds a program that Debian packages, also where it puts daemons, which is not in everyone's path.
func debian(program, pkg string) func(options) (string, error) {
	return func(options) (string, error) {
		for _, name := range []string{program, "/usr/sbin/" + program} {
			if path, err := exec.LookPath(name); err == nil {
				return path, nil
			}
		}
		return "", fmt.Errorf("%s is not installed: apt-get install --no-install-recommends %s (or leave it out with -only)", program, pkg)
	}
}

func contestantNames() []string {
	var names []string
	for _, c := range contestants {
		names = append(names, c.name)
	}
	return names
}

// resolve returns the contestants that o asks for, with their binaries. It reports all that are missing at once.
func resolve(o options) ([]contestant, error) {
	var found []contestant
	var missing []error
	for _, c := range contestants {
		chosen := o.only == nil && !c.optional || slices.Contains(o.only, c.name)
		works := slices.ContainsFunc(o.workloads(), func(w workload) bool { return isQuota(w.name) == c.quota })
		if !chosen || !works || c.name == baseline && o.baseline == "" {
			continue
		}
		if c.find != nil {
			var err error
			if c.binary, err = c.find(o); err == nil {
				c.binary, err = filepath.Abs(c.binary)
			}
			missing = append(missing, err)
		}
		found = append(found, c)
	}
	if found == nil {
		return nil, errors.New("none of the chosen contestants does the chosen work")
	}
	return found, errors.Join(missing...)
}

//go:embed configs
var configs embed.FS

// configure writes c's configuration, if it has one, into dir, and returns its command line.
func (c contestant) configure(dir, listen string, up *upstream) ([]string, error) {
	file := filepath.Join(dir, "config")
	setup := map[string]any{
		"Dir": dir, "Config": file, "Listen": listen, "Upstream": up.addr, "ServerName": serverName, "CAFile": up.caFile, "Beta": beta,
		"Workers": workers, "Connections": maxConnections, "Files": maxFiles, "NoDelay": c.name == haproxyNoDelay,
	}
	templates := template.Must(template.New("args").Option("missingkey=error").Parse(c.args))
	var args, config strings.Builder
	err := templates.Execute(&args, setup)
	if err == nil && c.config != "" {
		template.Must(templates.ParseFS(configs, "configs/*"))
		err = errors.Join(templates.ExecuteTemplate(&config, c.config, setup), os.WriteFile(file, []byte(config.String()), 0o644))
	}
	if err != nil {
		return nil, fmt.Errorf("writing the configuration: %w", err)
	}
	return strings.Fields(args.String()), nil
}
