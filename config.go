package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// Defaults that -h, the README and the manifests name too.
const (
	defaultConfigPath = "/etc/anthropic-oauth-proxy/config.toml"
	defaultSocket     = "/var/run/tailscale/tailscaled.sock"
	defaultListen     = "0.0.0.0:8080"
	defaultLocal      = "127.0.0.1:8080" // with -local
	defaultUpstream   = "https://api.anthropic.com"
)

// maxConfigFile is the size of the largest file that is read.
const maxConfigFile = 1 << 20

// config is the effective configuration. Whoever holds one holds a valid one: [loadConfig] returns no other.
type config struct {
	hostname           string        // expected tailnet name; another one is only warned about
	socket             string        // tailscaled's
	capability         string        // that callers must be granted; empty: none. Implies requireTailnet
	healthAddr         string        // of our own endpoints alone; empty: none
	proxyProtocolAddr  string        // on loopback, for a Tailscale Service; empty: none
	listenAddr         string        // host:port
	upstream           *url.URL      // absolute, http or https, perhaps with a path
	timeout            time.Duration // to response headers per attempt; of silence, in either direction; 1 s to 1 h
	timeoutRetries     int           // further attempts after a timeout; 0 to 10
	honorClientTimeout bool          // x-stainless-timeout may exceed timeout
	connectTimeout     time.Duration // DNS, forward proxy, TCP and TLS together; 1 s to 5 min
	maxConnections     int64         // proxied requests at once; 1 to 100,000
	maxBody            int64         // bytes of one request body; 1 MiB to 1 GiB
	bodyMemory         int64         // bytes of all request bodies; at least maxBody, at most 64 GiB
	drainTimeout       time.Duration // for requests in flight after SIGTERM; 0 to 1 h
	requireTailnet     bool          // refuse callers that tailscaled does not know
	headers            []header      // injected, never empty
	local              bool          // -local: no tailnet

	warnings []string // what is accepted, but should be looked at
}

// overrides are the settings from flags and environment, which win over the file. Empty means not given.
type overrides struct {
	path     string // of the file; it must exist
	listen   string
	upstream string
	socket   string
	local    bool
}

// configError is everything that is wrong with a configuration: one problem a line, each saying
// what to do.
type configError []string

// Error implements error.
func (e configError) Error() string { return strings.Join(e, "\n") }

// configPath returns the path of the file that o leads to.
func (o overrides) configPath() string { return cmp.Or(o.path, defaultConfigPath) }

// loadConfig reads the configuration file and applies o. found says whether there was a file. The
// error is a configError that lists every problem at once.
func loadConfig(o overrides) (cfg *config, found bool, err error) {
	var src []byte
	f, err := os.Open(o.configPath())
	if err == nil {
		defer f.Close()
		src, err = io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	}
	if len(src) > maxConfigFile {
		err = fmt.Errorf("%s is larger than 1 MiB", o.configPath())
	}
	if err != nil && (o.path != "" || !errors.Is(err, fs.ErrNotExist)) {
		return nil, false, configError{fmt.Sprintf("reading the configuration: %v: name an existing, readable file with -config or CONFIG_PATH, or none to use the defaults", err)}
	}
	cfg, parseErr := parseConfig(o.configPath(), src, o)
	if parseErr == nil {
		parseErr = checkForwardProxy(cfg.upstream)
	}
	return cfg, err == nil, parseErr
}

// checkForwardProxy refuses the environment's forward proxy on the way to the upstream if it is no address: net/http would
// look for a host called http. Its value may hold a password, and is not shown.
func checkForwardProxy(upstream *url.URL) error {
	via, err := http.ProxyFromEnvironment(&http.Request{URL: upstream})
	if err == nil && (via == nil || // none, or NO_PROXY has the upstream
		via.Hostname() != "" && (via.Path == "" || via.Path == "/") && slices.Contains([]string{"http", "https", "socks5", "socks5h"}, via.Scheme)) {
		return nil
	}
	name := strings.ToUpper(upstream.Scheme) + "_PROXY"
	if os.Getenv(name) == "" {
		name = strings.ToLower(name)
	}
	return configError{name + ", in the environment, is not the URL of a proxy: write it like http://proxy.example.com:3128, or name the upstream in NO_PROXY"}
}

// section is a table of the file.
type section struct {
	name     string
	settings []setting
}

// setting is one key in a table of the file.
type setting struct {
	key      string
	field    any    // where it is kept: *string, *bool, or a pointer to a kind of integer
	initial  any    // the default, as it would stand in the file
	unit     int64  // of an integer: field = value * unit
	min, max int64  // of an integer, in units
	override string // of a string, from a flag or the environment: wins over the file, if not empty
	obsolete bool   // taken from old files with a warning, and never written
}

// sections lists all keys but those of [[headers]], in the order in which they are written. The upstream's is a text
// until it has been validated.
func (c *config) sections(upstreamURL *string, o overrides) []section {
	const secs, mb = int64(time.Second), 1 << 20
	if o.local {
		o.listen = cmp.Or(o.listen, defaultLocal)
	}
	return []section{
		{"tailscale", []setting{
			{key: "hostname", field: &c.hostname, initial: "anthropic-oauth-proxy"},
			{key: "socket", field: &c.socket, initial: defaultSocket, override: o.socket},
			{key: "capability", field: &c.capability, initial: ""},
			{key: "state_dir", field: new(string), initial: "", obsolete: true},
			{key: "auth_key_file", field: new(string), initial: "", obsolete: true},
		}},
		{"proxy", []setting{
			{key: "listen_addr", field: &c.listenAddr, initial: defaultListen, override: o.listen},
			{key: "upstream_url", field: upstreamURL, initial: defaultUpstream, override: o.upstream},
			{key: "timeout_secs", field: &c.timeout, initial: 60, unit: secs, min: 1, max: 3600},
			{key: "timeout_retries", field: &c.timeoutRetries, initial: 2, unit: 1, max: 10},
			{key: "honor_client_timeout", field: &c.honorClientTimeout, initial: true},
			{key: "connect_timeout_secs", field: &c.connectTimeout, initial: 5, unit: secs, min: 1, max: 300},
			{key: "proxy_protocol_addr", field: &c.proxyProtocolAddr, initial: ""},
			{key: "health_addr", field: &c.healthAddr, initial: ""},
			{key: "max_connections", field: &c.maxConnections, initial: 1000, unit: 1, min: 1, max: 100_000},
			{key: "max_body_mb", field: &c.maxBody, initial: 10, unit: mb, min: 1, max: 1024},
			{key: "body_memory_mb", field: &c.bodyMemory, initial: 48, unit: mb, min: 1, max: 65_536},
			{key: "drain_timeout_secs", field: &c.drainTimeout, initial: 5, unit: secs, max: 3600},
			{key: "require_tailnet", field: &c.requireTailnet, initial: false},
		}},
	}
}

// assign keeps v, or says what it must be instead.
func (s *setting) assign(v any) (must string) {
	field, value := reflect.ValueOf(s.field).Elem(), reflect.ValueOf(v)
	switch {
	case s.unit > 0 && value.CanInt() && value.Int() >= s.min && value.Int() <= s.max:
		field.SetInt(value.Int() * s.unit)
	case s.unit > 0:
		return fmt.Sprintf("a whole number from %d to %d", s.min, s.max)
	case value.Type() == field.Type():
		field.Set(value)
	case field.Kind() == reflect.Bool:
		return "true or false"
	default:
		return "a string: put it in quotes"
	}
	return ""
}

// text returns the value as it stands in a file.
func (s *setting) text() string {
	switch v := s.field.(type) {
	case *string:
		return quoteTOML(*v)
	case *bool:
		return strconv.FormatBool(*v)
	}
	return strconv.FormatInt(reflect.ValueOf(s.field).Elem().Int()/s.unit, 10)
}

// configReader turns a file into a config and gathers what is wrong with it.
type configReader struct {
	path               string
	cfg                *config
	at                 map[string]position // where the file's settings stand
	problems, warnings []tomlError         // at the zero position if not in the file
}

// parseConfig returns the configuration that the file's text and o make together.
func parseConfig(path string, src []byte, o overrides) (*config, error) {
	root, problems := parseTOML(src)
	r := &configReader{path: path, cfg: &config{local: o.local}, at: map[string]position{}, problems: problems}
	r.decode(root, o)
	if r.validate(); len(r.problems) > 0 {
		return nil, configError(r.lines(r.problems))
	}
	r.cfg.warnings = r.lines(r.warnings)
	return r.cfg, nil
}

// lines formats problems or warnings in file order.
func (r *configReader) lines(found []tomlError) (lines []string) {
	slices.SortStableFunc(found, func(a, b tomlError) int { return cmp.Or(a.pos.line-b.pos.line, a.pos.col-b.pos.col) })
	for _, e := range found {
		line := e.msg
		if e.pos != (position{}) {
			line = r.path + ":" + e.Error()
		}
		lines = append(lines, line)
	}
	return lines
}

// fail records a problem.
func (r *configReader) fail(at position, format string, args ...any) {
	r.problems = append(r.problems, tomlError{at, fmt.Sprintf(format, args...)})
}

// warn records what is accepted, but should be looked at.
func (r *configReader) warn(at position, format string, args ...any) {
	r.warnings = append(r.warnings, tomlError{at, fmt.Sprintf(format, args...)})
}

// decode takes the settings from a file's root table, defaults and o.
func (r *configReader) decode(root *tomlTable, o overrides) {
	var upstreamURL string
	known := []string{"headers"}
	for _, s := range r.cfg.sections(&upstreamURL, o) {
		known = append(known, s.name)
		e := cmp.Or(root.entries[s.name], &tomlEntry{value: &tomlTable{}})
		table, ok := e.value.(*tomlTable)
		if !ok {
			r.fail(e.pos, "%s is a table: write [%s] on a line of its own and its settings below", s.name, s.name)
			table = &tomlTable{}
		}
		r.decodeTable(s, table)
	}
	if e := root.entries["headers"]; e != nil {
		r.decodeHeaders(e)
	}
	r.refuseUnknown("", root, known)
	r.cfg.upstream = r.parseUpstream(upstreamURL)
}

// decodeTable takes the settings of one table.
func (r *configReader) decodeTable(in section, table *tomlTable) {
	var known []string
	for _, s := range in.settings {
		known = append(known, s.key)
		s.assign(s.initial)
		name := in.name + "." + s.key
		if e := table.entries[s.key]; e != nil {
			r.at[name] = e.valuePos
			if must := s.assign(e.value); must != "" {
				r.fail(e.valuePos, "%s must be %s", name, must)
			}
			if s.obsolete {
				r.warn(e.pos, "%s is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line", name)
			}
		}
		if s.override != "" {
			s.assign(s.override)
			delete(r.at, name)
		}
	}
	r.refuseUnknown(in.name+".", table, known)
}

// refuseUnknown records the keys that no setting has.
func (r *configReader) refuseUnknown(prefix string, table *tomlTable, known []string) {
	for key, e := range table.entries {
		if slices.Contains(known, key) {
			continue
		}
		hint := "known here: " + strings.Join(known, ", ")
		best := slices.MinFunc(known, func(a, b string) int { return difference(key, a) - difference(key, b) })
		if difference(key, best) <= 3 {
			hint = fmt.Sprintf("did you mean %s?", best)
		}
		r.fail(e.pos, "unknown key %s%s: %s", prefix, key, hint)
	}
}

// decodeHeaders takes the [[headers]] entries.
func (r *configReader) decodeHeaders(e *tomlEntry) {
	tables, ok := e.value.([]*tomlTable)
	if !ok {
		r.fail(e.pos, "headers must be an array of tables: write [[headers]], then name and value below")
	}
	r.at["headers"] = e.pos
	for _, table := range tables {
		var name, value string
		before := len(r.problems)
		r.decodeTable(section{"headers", []setting{{key: "name", field: &name, initial: ""}, {key: "value", field: &value, initial: ""}}}, table)
		switch {
		case table.incomplete: // which has been reported
		case table.entries["name"] == nil || table.entries["value"] == nil:
			r.fail(table.pos, "each of headers needs a name and a value")
		case len(r.problems) == before:
			r.addHeader(name, value)
		}
	}
}

// addHeader validates a header and adds it to those that are injected.
func (r *configReader) addHeader(name, value string) {
	nameAt, valueAt := r.at["headers.name"], r.at["headers.value"]
	h := header{textproto.CanonicalMIMEHeaderKey(name), []string{value}}
	switch {
	case !isToken(name):
		r.fail(nameAt, "headers.name %q is not a header name: write letters, digits and hyphens", name)
	case h.name == "Authorization", h.name == "Host", h.name == "Content-Length", isHopByHop(h.name):
		r.fail(nameAt, "the header %s can't be injected, as it belongs to the client or to the connection: remove the entry", name)
	case !isFieldValue(value):
		r.fail(valueAt, "the value of the header %s has control characters, or blanks at its ends: remove them", name)
	case slices.ContainsFunc(r.cfg.headers, func(other header) bool { return other.name == h.name }):
		r.fail(nameAt, "the header %s is given twice: keep one entry (several betas are one value with commas)", name)
	}
	if h.name == betaHeader {
		h.values = strings.Split(value, ",")
		for i, token := range h.values {
			h.values[i] = strings.TrimSpace(token)
		}
		if slices.Contains(h.values, "") {
			r.fail(valueAt, "the value of the header %s has an empty element: remove a comma", name)
		}
	}
	r.cfg.headers = append(r.cfg.headers, h)
}

// validate checks what no setting could see alone, and adds the header that OAuth tokens need.
func (r *configReader) validate() {
	c := r.cfg
	r.checkAddr("proxy.listen_addr", c.listenAddr)
	if c.healthAddr != "" {
		r.checkAddr("proxy.health_addr", c.healthAddr)
	}
	if c.bodyMemory < c.maxBody {
		r.fail(cmp.Or(r.at["proxy.body_memory_mb"], r.at["proxy.max_body_mb"]), "proxy.body_memory_mb (%d) must be at least proxy.max_body_mb (%d), or the largest body could never be read", c.bodyMemory>>20, c.maxBody>>20)
	}
	if ap, err := netip.ParseAddrPort(c.proxyProtocolAddr); c.proxyProtocolAddr != "" && (err != nil || !ap.Addr().IsLoopback()) {
		r.fail(r.at["proxy.proxy_protocol_addr"], "proxy.proxy_protocol_addr %q is not a loopback address with a port: whoever reaches it could claim to be anybody; write 127.0.0.2:8082", c.proxyProtocolAddr)
	}
	if domain, rest, _ := strings.Cut(c.capability, "/"); c.capability != "" && (!isToken(domain) || !strings.Contains(domain, ".") || rest == "" || strings.ContainsFunc(rest, unicode.IsSpace)) {
		r.fail(r.at["tailscale.capability"], "tailscale.capability %q is not the name of an app capability: write it as in the grant, such as example.com/cap/claude", c.capability)
	}
	for key, given := range map[string]bool{"proxy.require_tailnet": c.requireTailnet, "tailscale.capability": c.capability != "", "proxy.proxy_protocol_addr": c.proxyProtocolAddr != ""} {
		if given && c.local {
			r.fail(r.at[key], "%s contradicts -local, which has no tailnet: leave one of them out", key)
		}
	}
	c.requireTailnet = c.requireTailnet || c.capability != ""
	if c.socket == "" {
		r.fail(r.at["tailscale.socket"], "tailscale.socket is empty: give the path of tailscaled's socket, by default %s", defaultSocket)
	}
	if len(c.headers) == 0 {
		c.headers = []header{{betaHeader, []string{"oauth-2025-04-20"}}}
	}
	if !slices.ContainsFunc(c.headers, func(h header) bool { return h.name == betaHeader }) {
		r.warn(r.at["headers"], "no [[headers]] entry injects anthropic-beta: the API refuses OAuth tokens without oauth-2025-04-20 in it")
	}
}

// checkAddr validates an address to listen on.
func (r *configReader) checkAddr(key, addr string) {
	_, port, err := net.SplitHostPort(addr)
	if _, noPort := strconv.ParseUint(port, 10, 16); err != nil || noPort != nil {
		r.fail(r.at[key], "%s %q has no port from 0 to 65535: write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080", key, addr)
	}
}

// parseUpstream validates proxy.upstream_url. A slash at its end is dropped: request paths begin with one.
func (r *configReader) parseUpstream(given string) *url.URL {
	at := r.at["proxy.upstream_url"]
	u, err := url.Parse(given)
	if err != nil {
		u = &url.URL{} // which is not absolute
	}
	port, err := strconv.ParseUint(cmp.Or(u.Port(), "1"), 10, 16)
	switch {
	case u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", strings.HasSuffix(u.Host, ":"), err != nil, port == 0:
		r.fail(at, "proxy.upstream_url %q is not an absolute http or https URL: write one such as %s", redactURL(given), defaultUpstream)
	case u.User != nil:
		r.fail(at, "proxy.upstream_url has a user or password in it: leave them out, the proxy holds no credentials")
	case strings.ContainsAny(given, "?#"):
		r.fail(at, "proxy.upstream_url %q has a query or fragment, which requests can't be appended to: leave it out", redactURL(given))
	case u.Scheme == "http" && !isLoopback(u.Hostname()):
		r.warn(at, "proxy.upstream_url %s is plain http: bearer tokens would cross the network in clear text; use https", given)
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	u.RawPath = path
	u.Path, _ = url.PathUnescape(path)
	return u
}

// redactURL cuts off a URL's query, and leaves nothing if there may be a password.
func redactURL(s string) string {
	if strings.Contains(s, "@") {
		return "…"
	}
	s, _, _ = strings.Cut(s, "?")
	return s
}

// isLoopback reports whether host never leaves the machine.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || host == "localhost"
}

// isToken reports whether s is a token (RFC 9110, 5.6.2), as header names are.
func isToken(s string) bool {
	return s != "" && strings.IndexFunc(s, func(c rune) bool {
		return c > '~' || c <= ' ' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c)
	}) < 0
}

// isFieldValue reports whether s is a header's value (RFC 9110, 5.5).
func isFieldValue(s string) bool {
	return s == strings.Trim(s, " \t") && strings.IndexFunc(s, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) < 0
}

// toml writes the effective configuration as a file that parseConfig reads back.
func (c *config) toml() string {
	var b strings.Builder
	upstreamURL := c.upstream.String()
	for _, in := range c.sections(&upstreamURL, overrides{}) {
		fmt.Fprintf(&b, "\n[%s]\n", in.name)
		for _, s := range in.settings {
			if !s.obsolete {
				fmt.Fprintf(&b, "%s = %s\n", s.key, s.text())
			}
		}
	}
	for _, h := range c.headers {
		fmt.Fprintf(&b, "\n[[headers]]\nname = %s\nvalue = %s\n", quoteTOML(strings.ToLower(h.name)), quoteTOML(strings.Join(h.values, ",")))
	}
	return strings.TrimPrefix(b.String(), "\n")
}

// seconds returns d in whole seconds.
func seconds(d time.Duration) int64 { return int64(d / time.Second) }

// difference is the Levenshtein distance of two keys, in bytes; 1 if key, of 3 bytes at least, is part of known.
func difference(key, known string) int {
	if len(key) >= 3 && strings.Contains(known, key) {
		return 1
	}
	row := make([]int, len(known)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(key) {
		diagonal := row[0]
		row[0]++
		for j := range len(known) {
			replaced := diagonal
			if key[i] != known[j] {
				replaced++
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, replaced)
		}
	}
	return row[len(known)]
}
