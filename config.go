package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"
)

// Defaults that -h, the README and the manifests name too.
const (
	defaultConfigPath = "/etc/anthropic-oauth-proxy/config.toml"
	defaultSocket     = "/var/run/tailscale/tailscaled.sock"
	defaultListen     = "0.0.0.0:8080"
	defaultLocal      = "127.0.0.1:8080" // with -local
	defaultUpstream   = "https://api.anthropic.com"
)

// config is the effective configuration. Whoever holds one holds a valid one: [loadConfig] returns no other.
type config struct {
	hostname           string        // expected tailnet name; another one is only warned about
	socket             string        // tailscaled's
	listenAddr         string        // host:port
	upstream           *url.URL      // absolute, http or https, perhaps with a path
	timeout            time.Duration // to response headers per attempt, then of silence; 1 s to 1 h
	timeoutRetries     int           // further attempts after a timeout; 0 to 10
	honorClientTimeout bool          // x-stainless-timeout may exceed timeout
	connectTimeout     time.Duration // TCP and TLS; 1 s to 5 min
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
	src, err := os.ReadFile(o.configPath())
	if err != nil && (o.path != "" || !errors.Is(err, fs.ErrNotExist)) {
		return nil, false, configError{fmt.Sprintf("reading the configuration: %v: name an existing, readable file with -config or CONFIG_PATH, or none to use the defaults", err)}
	}
	cfg, parseErr := parseConfig(o.configPath(), src, o)
	return cfg, err == nil, parseErr
}

// rawConfig holds the settings as they stand in a file.
type rawConfig struct {
	hostname, socket, stateDir, authKeyFile               string
	listenAddr, upstreamURL                               string
	timeout, timeoutRetries, connectTimeout, drainTimeout int64
	maxConnections, maxBodyMB, bodyMemoryMB               int64
	honorClientTimeout, requireTailnet                    bool
	headers                                               []rawHeader
}

// rawHeader is one [[headers]] entry.
type rawHeader struct {
	at          position
	name, value string
}

// defaults returns the settings of an empty file.
func defaults() *rawConfig {
	return &rawConfig{
		hostname: "anthropic-oauth-proxy", socket: defaultSocket,
		listenAddr: defaultListen, upstreamURL: defaultUpstream,
		timeout: 60, timeoutRetries: 2, connectTimeout: 5, drainTimeout: 5,
		maxConnections: 1000, maxBodyMB: 10, bodyMemoryMB: 48,
		honorClientTimeout: true,
	}
}

// setting is one key of the file.
type setting struct {
	key      string // with its table: "proxy.timeout_secs"
	value    any    // where it is kept: *string, *bool or *int64
	min, max int64  // of an *int64
	obsolete bool   // taken from old files with a warning, and never written
}

// settings lists all keys but those of [[headers]], in the order in which they are written.
func (c *rawConfig) settings() []setting {
	return []setting{
		{key: "tailscale.hostname", value: &c.hostname},
		{key: "tailscale.socket", value: &c.socket},
		{key: "tailscale.state_dir", value: &c.stateDir, obsolete: true},
		{key: "tailscale.auth_key_file", value: &c.authKeyFile, obsolete: true},
		{key: "proxy.listen_addr", value: &c.listenAddr},
		{key: "proxy.upstream_url", value: &c.upstreamURL},
		{key: "proxy.timeout_secs", value: &c.timeout, min: 1, max: 3600},
		{key: "proxy.timeout_retries", value: &c.timeoutRetries, max: 10},
		{key: "proxy.honor_client_timeout", value: &c.honorClientTimeout},
		{key: "proxy.connect_timeout_secs", value: &c.connectTimeout, min: 1, max: 300},
		{key: "proxy.max_connections", value: &c.maxConnections, min: 1, max: 100_000},
		{key: "proxy.max_body_mb", value: &c.maxBodyMB, min: 1, max: 1024},
		{key: "proxy.body_memory_mb", value: &c.bodyMemoryMB, min: 1, max: 65_536},
		{key: "proxy.drain_timeout_secs", value: &c.drainTimeout, max: 3600},
		{key: "proxy.require_tailnet", value: &c.requireTailnet},
	}
}

// configReader turns a file into a config and gathers what is wrong with it.
type configReader struct {
	path     string
	raw      *rawConfig
	at       map[string]position // where the file's settings stand
	problems []tomlError         // at the zero position if not in the file
	warnings []string
}

// parseConfig returns the configuration that the file's text and o make together.
func parseConfig(path string, src []byte, o overrides) (*config, error) {
	r := &configReader{path: path, raw: defaults(), at: map[string]position{}}
	root, syntax := parseTOML(src)
	r.problems = syntax
	r.decode(root)
	r.override(o)
	cfg := r.build(o.local)
	if len(r.problems) == 0 {
		return cfg, nil
	}
	sort.SliceStable(r.problems, func(i, j int) bool {
		a, b := r.problems[i].pos, r.problems[j].pos
		return cmp.Or(a.line-b.line, a.col-b.col) < 0
	})
	var lines configError
	for _, p := range r.problems {
		lines = append(lines, r.line(p.pos, p.msg))
	}
	return nil, lines
}

// line formats one problem or warning.
func (r *configReader) line(at position, message string) string {
	if at == (position{}) {
		return message
	}
	return fmt.Sprintf("%s:%d:%d: %s", r.path, at.line, at.col, message)
}

// fail records a problem.
func (r *configReader) fail(at position, format string, args ...any) {
	r.problems = append(r.problems, tomlError{at, fmt.Sprintf(format, args...)})
}

// warn records what is accepted, but should be looked at.
func (r *configReader) warn(at position, format string, args ...any) {
	r.warnings = append(r.warnings, r.line(at, fmt.Sprintf(format, args...)))
}

// decode takes the settings from a file's root table.
func (r *configReader) decode(root *tomlTable) {
	for _, e := range root.entries {
		table, isTable := e.value.v.(*tomlTable)
		switch {
		case e.key == "headers":
			r.decodeHeaders(e)
		case e.key != "tailscale" && e.key != "proxy":
			r.unknown(e, "", []string{"tailscale", "proxy", "headers"})
		case !isTable:
			r.fail(e.pos, "%s is a table: write [%s] on a line of its own and its settings below", e.key, e.key)
		default:
			r.decodeTable(e.key, table)
		}
	}
}

// decodeTable takes the settings of one table.
func (r *configReader) decodeTable(name string, table *tomlTable) {
	known := map[string]setting{}
	for _, s := range r.raw.settings() {
		if key, ok := strings.CutPrefix(s.key, name+"."); ok {
			known[key] = s
		}
	}
	for _, e := range table.entries {
		s, ok := known[e.key]
		if !ok {
			r.unknown(e, name+".", slices.Sorted(maps.Keys(known)))
			continue
		}
		r.at[s.key] = e.value.pos
		r.assign(s, e.value)
		if s.obsolete {
			r.warn(e.pos, "%s is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line", s.key)
		}
	}
}

// assign sets s to a value of its type and range.
func (r *configReader) assign(s setting, value *tomlValue) {
	switch target := s.value.(type) {
	case *string:
		if v, ok := value.v.(string); ok {
			*target = v
		} else {
			r.fail(value.pos, "%s must be a string: put it in quotes", s.key)
		}
	case *bool:
		if v, ok := value.v.(bool); ok {
			*target = v
		} else {
			r.fail(value.pos, "%s must be true or false", s.key)
		}
	case *int64:
		v, ok := value.v.(int64)
		if !ok || v < s.min || v > s.max {
			r.fail(value.pos, "%s must be a whole number from %d to %d", s.key, s.min, s.max)
			return
		}
		*target = v
	}
}

// unknown records a key that no setting has.
func (r *configReader) unknown(e tomlEntry, prefix string, known []string) {
	hint := "known here: " + strings.Join(known, ", ")
	if best := slices.MinFunc(known, func(a, b string) int { return editDistance(a, e.key) - editDistance(b, e.key) }); editDistance(best, e.key) <= 3 {
		hint = fmt.Sprintf("did you mean %s?", best)
	}
	r.fail(e.pos, "unknown key %s%s: %s", prefix, e.key, hint)
}

// decodeHeaders takes the [[headers]] entries.
func (r *configReader) decodeHeaders(e tomlEntry) {
	entries, ok := e.value.v.([]*tomlValue)
	if !ok {
		r.fail(e.pos, "headers must be an array of tables: write [[headers]], then name and value below")
		return
	}
	for _, entry := range entries {
		table, ok := entry.v.(*tomlTable)
		if !ok {
			r.fail(entry.pos, "each of headers must be a table with name and value")
			continue
		}
		h, sound := rawHeader{at: entry.pos}, len(r.problems)
		for _, field := range table.entries {
			switch field.key {
			case "name":
				r.assign(setting{key: "headers.name", value: &h.name}, field.value)
			case "value":
				r.assign(setting{key: "headers.value", value: &h.value}, field.value)
			default:
				r.unknown(field, "headers.", []string{"name", "value"})
			}
		}
		if !table.incomplete && (table.get("name") == nil || table.get("value") == nil) {
			r.fail(entry.pos, "each of headers needs a name and a value")
		}
		if !table.incomplete && len(r.problems) == sound { // else it has been reported
			r.raw.headers = append(r.raw.headers, h)
		}
	}
}

// override applies flags and environment, which win over the file.
func (r *configReader) override(o overrides) {
	if o.local {
		r.raw.listenAddr = defaultLocal
		delete(r.at, "proxy.listen_addr")
	}
	for key, given := range map[string]string{
		"tailscale.socket": o.socket, "proxy.listen_addr": o.listen, "proxy.upstream_url": o.upstream,
	} {
		for _, s := range r.raw.settings() {
			if s.key == key && given != "" {
				*s.value.(*string) = given
				delete(r.at, key)
			}
		}
	}
}

// build validates what assign could not see alone.
func (r *configReader) build(local bool) *config {
	raw := r.raw
	cfg := &config{
		hostname:           raw.hostname,
		socket:             raw.socket,
		listenAddr:         raw.listenAddr,
		upstream:           r.upstreamURL(),
		timeout:            time.Duration(raw.timeout) * time.Second,
		timeoutRetries:     int(raw.timeoutRetries),
		honorClientTimeout: raw.honorClientTimeout,
		connectTimeout:     time.Duration(raw.connectTimeout) * time.Second,
		maxConnections:     raw.maxConnections,
		maxBody:            raw.maxBodyMB << 20,
		bodyMemory:         raw.bodyMemoryMB << 20,
		drainTimeout:       time.Duration(raw.drainTimeout) * time.Second,
		requireTailnet:     raw.requireTailnet,
		headers:            r.headers(),
		local:              local,
	}
	if err := validateListen(raw.listenAddr); err != nil {
		r.fail(r.at["proxy.listen_addr"], "the listen address %q %v: write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080", raw.listenAddr, err)
	}
	if raw.bodyMemoryMB < raw.maxBodyMB {
		at := cmp.Or(r.at["proxy.body_memory_mb"], r.at["proxy.max_body_mb"])
		r.fail(at, "proxy.body_memory_mb (%d) must be at least proxy.max_body_mb (%d), or the largest body could never be read", raw.bodyMemoryMB, raw.maxBodyMB)
	}
	if raw.requireTailnet && local {
		r.fail(r.at["proxy.require_tailnet"], "proxy.require_tailnet contradicts -local, which has no tailnet: leave one of them out")
	}
	if raw.socket == "" {
		r.fail(r.at["tailscale.socket"], "tailscale.socket is empty: give the path of tailscaled's socket, by default %s", defaultSocket)
	}
	cfg.warnings = r.warnings
	return cfg
}

// validateListen says what is wrong with a listen address.
func validateListen(addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return errors.New("has no port")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return errors.New("has a port that is not a number from 0 to 65535")
	}
	return nil
}

// upstreamURL validates proxy.upstream_url. A slash at its end is dropped: request paths begin with one.
func (r *configReader) upstreamURL() *url.URL {
	at, given := r.at["proxy.upstream_url"], r.raw.upstreamURL
	u, err := url.Parse(given)
	port := uint64(0)
	if err == nil && u.Port() != "" {
		port, err = strconv.ParseUint(u.Port(), 10, 16)
	}
	switch {
	case err != nil, u.Scheme != "http" && u.Scheme != "https", u.Hostname() == "", strings.HasSuffix(u.Host, ":"), u.Port() != "" && port == 0:
		r.fail(at, "the upstream %q is not an absolute http or https URL: write one such as %s", redactURL(given), defaultUpstream)
		return nil
	case u.User != nil:
		r.fail(at, "the upstream has a user or password in it: leave them out, the proxy holds no credentials")
		return nil
	case strings.ContainsAny(given, "?#"):
		r.fail(at, "the upstream %q has a query or fragment, which requests can't be appended to: leave it out", redactURL(given))
		return nil
	}
	if u.Scheme == "http" && !isLoopback(u.Hostname()) {
		r.warn(at, "the upstream %s is plain http: bearer tokens would cross the network in clear text; use https", given)
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	u.RawPath = path
	u.Path, _ = url.PathUnescape(path)
	return u
}

// redactURL cuts a URL before its query, and removes a password.
func redactURL(s string) string {
	s, _, _ = strings.Cut(s, "?")
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			return scheme + "://…" + rest[i:]
		}
	}
	return s
}

// isLoopback reports whether host never leaves the machine.
func isLoopback(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.IsLoopback() || host == "localhost"
}

// headers validates [[headers]]; without any it is the one that OAuth tokens need.
func (r *configReader) headers() []header {
	given := r.raw.headers
	if len(given) == 0 {
		return []header{{name: betaHeader, values: []string{"oauth-2025-04-20"}}}
	}
	var headers []header
	for _, h := range given {
		name := textproto.CanonicalMIMEHeaderKey(h.name)
		values := []string{h.value}
		switch {
		case !isToken(h.name):
			r.fail(h.at, "%q is not a header name", h.name)
		case name == "Authorization", name == "Host", name == "Content-Length", isHopByHop(name):
			r.fail(h.at, "the header %s can't be injected: it belongs to the client or to the connection", h.name)
		case !isFieldValue(h.value):
			r.fail(h.at, "the value of the header %s has control characters, or blanks at its ends", h.name)
		case slices.ContainsFunc(headers, func(other header) bool { return other.name == name }):
			r.fail(h.at, "the header %s is given twice: keep one entry (several betas are one value with commas)", h.name)
		}
		if name == betaHeader {
			values = nil
			for token := range strings.SplitSeq(h.value, ",") {
				if token = strings.TrimSpace(token); token == "" {
					r.fail(h.at, "the value of the header %s has an empty element", h.name)
				}
				values = append(values, token)
			}
		}
		headers = append(headers, header{name, values})
	}
	if !slices.ContainsFunc(headers, func(h header) bool { return h.name == betaHeader }) {
		r.warn(given[0].at, "no [[headers]] entry injects anthropic-beta: the API refuses OAuth tokens without oauth-2025-04-20 in it")
	}
	return headers
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
	raw := &rawConfig{
		hostname: c.hostname, socket: c.socket,
		listenAddr: c.listenAddr, upstreamURL: c.upstream.String(),
		timeout: seconds(c.timeout), timeoutRetries: int64(c.timeoutRetries),
		connectTimeout: seconds(c.connectTimeout), drainTimeout: seconds(c.drainTimeout),
		maxConnections: c.maxConnections, maxBodyMB: c.maxBody >> 20, bodyMemoryMB: c.bodyMemory >> 20,
		honorClientTimeout: c.honorClientTimeout, requireTailnet: c.requireTailnet,
	}
	var b strings.Builder
	table := ""
	for _, s := range raw.settings() {
		if s.obsolete {
			continue
		}
		in, key, _ := strings.Cut(s.key, ".")
		if in != table {
			if table != "" {
				b.WriteByte('\n')
			}
			fmt.Fprintf(&b, "[%s]\n", in)
			table = in
		}
		switch v := s.value.(type) {
		case *string:
			fmt.Fprintf(&b, "%s = %s\n", key, quoteTOML(*v))
		case *int64:
			fmt.Fprintf(&b, "%s = %d\n", key, *v)
		case *bool:
			fmt.Fprintf(&b, "%s = %t\n", key, *v)
		}
	}
	for _, h := range c.headers {
		fmt.Fprintf(&b, "\n[[headers]]\nname = %s\nvalue = %s\n", quoteTOML(strings.ToLower(h.name)), quoteTOML(strings.Join(h.values, ",")))
	}
	return b.String()
}

// seconds returns d in whole seconds.
func seconds(d time.Duration) int64 { return int64(d / time.Second) }

// editDistance is the Levenshtein distance of a and b, in bytes.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			diagonal, row[j+1] = row[j+1], min(row[j]+1, row[j+1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
