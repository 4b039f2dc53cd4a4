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

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// What each contestant is told, in its own words.
const (
	beta           = fakeanthropic.OAuthBeta // to be added to the client's betas
	workers        = 2                       // threads or processes, also where there are more cores
	maxConnections = 2500                    // above the largest workload
	maxFiles       = 16384                   // of a process: both ends of 2,000 streams, twice over
	quotaCPUs      = 0.5                     // the CPU limit of the Kubernetes manifests
)

// The contestants.
const (
	ours           = "proxy"
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
	name   string
	debian string   // the package that has it, if it is other people's
	config string   // its configuration, a template in configs
	args   string   // its command line, a template
	env    []string // all of its environment, but for what start adds
	http1  bool     // all that it speaks to an upstream
	quota  bool     // may use quotaCPUs
	binary string   // as found by resolve
}

const (
	proxyConfig = "proxy.toml.tmpl"
	proxyArgs   = "-local -listen {{.Listen}} -config {{.Config}}"
	haproxyArgs = "-db -q -f {{.Config}}"
	caddyArgs   = "run --adapter caddyfile --config {{.Config}}"
	goProcs     = "GOMAXPROCS=2" // as many as workers
)

// contestants are all there are, in the order of the tables.
var contestants = []contestant{
	{name: ours, config: proxyConfig, args: proxyArgs, env: proxyEnv(goProcs)},
	{name: limited, config: proxyConfig, args: proxyArgs, env: proxyEnv(), quota: true},
	{name: limitedOne, config: proxyConfig, args: proxyArgs, env: proxyEnv("GOMAXPROCS=1"), quota: true},
	{name: baseline, config: proxyConfig, args: proxyArgs, env: proxyEnv(goProcs)},
	{name: nginx, debian: "nginx-light", config: "nginx.conf.tmpl", args: "-p {{.Dir}} -e stderr -c {{.Config}}", http1: true},
	{name: haproxy, debian: "haproxy", config: "haproxy.cfg.tmpl", args: haproxyArgs, http1: true},
	{name: haproxyNoDelay, debian: "haproxy", config: "haproxy.cfg.tmpl", args: haproxyArgs, http1: true},
	{name: caddy, debian: "caddy", config: "Caddyfile.tmpl", args: caddyArgs, env: []string{goProcs}},
	{name: reverseProxy, args: reverseProxyMode + " {{.Listen}} {{.Upstream}}", env: []string{goProcs}},
	{name: direct, http1: true},
}

// proxyEnv is as in Kubernetes, but for twice the manifests' GOMEMLIMIT, which carries the connections of the largest workload.
func proxyEnv(more ...string) []string {
	return append([]string{"LOG_LEVEL=info", "GOMEMLIMIT=256MiB"}, more...)
}

// find returns c's binary; direct has none.
func (c contestant) find(o options) (string, error) {
	switch {
	case c.debian != "":
		// Debian puts daemons where not everyone's path leads.
		program, _, _ := strings.Cut(c.debian, "-")
		for _, name := range []string{program, "/usr/sbin/" + program} {
			if path, err := exec.LookPath(name); err == nil {
				return path, nil
			}
		}
		return "", fmt.Errorf("%s is not installed: apt-get install --no-install-recommends %s (or leave it out with -only)",
			program, c.debian)
	case c.name == reverseProxy:
		return os.Executable()
	case c.name == baseline:
		return filepath.Abs(o.baseline)
	case c.name == direct:
		return "", nil
	case o.binary != "":
		return filepath.Abs(o.binary)
	}
	return proxytest.Build()
}

// resolve returns the contestants that o asks for, with their binaries. It reports all that are missing at once.
func resolve(o options) (found []contestant, err error) {
	for _, c := range contestants {
		chosen := o.only == nil || slices.Contains(o.only, c.name)
		works := slices.ContainsFunc(o.workloads(), func(w workload) bool { return isQuota(w.name) == c.quota })
		if chosen && works && (c.name != baseline || o.baseline != "") {
			var missing error
			c.binary, missing = c.find(o)
			err = errors.Join(err, missing)
			found = append(found, c)
		}
	}
	if found == nil {
		return nil, errors.New("none of the chosen contestants does the chosen work")
	}
	return found, err
}

//go:embed configs
var configs embed.FS

// configure writes c's configuration, if it has one, into dir, and returns its command line.
func (c contestant) configure(dir, listen string, up *fakeanthropic.Server) ([]string, error) {
	file := filepath.Join(dir, "config")
	setup := map[string]any{
		"Dir": dir, "Config": file, "Listen": listen, "Upstream": address(up), "ServerName": serverName, "CAFile": up.CAFile,
		"Beta": beta, "Workers": workers, "Connections": maxConnections, "Files": maxFiles, "NoDelay": c.name == haproxyNoDelay,
	}
	templates := template.Must(template.New("args").Option("missingkey=error").Parse(c.args))
	var args, config strings.Builder
	err := templates.Execute(&args, setup)
	if c.config != "" {
		template.Must(templates.ParseFS(configs, "configs/*"))
		err = errors.Join(err, templates.ExecuteTemplate(&config, c.config, setup), os.WriteFile(file, []byte(config.String()), 0o644))
	}
	return strings.Fields(args.String()), err
}
