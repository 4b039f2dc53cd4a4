package main

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// settings sets every key to something else than its default.
const settings = "[tailscale]\nhostname = \"h\"\nsocket = \"/s\"\ncapability = \"example.com/cap/x\"\n[proxy]\nlisten_addr = \"[::1]:0\"\nupstream_url = \"http://localhost:81/a%2Fb/\"\ntimeout_secs = 1\n" +
	"timeout_retries = 3\nhonor_client_timeout = false\nconnect_timeout_secs = 4\nproxy_protocol_addr = \"127.0.0.2:0\"\nhealth_addr = \":8081\"\nmax_connections = 5\nmax_body_mb = 6\nbody_memory_mb = 7\ndrain_timeout_secs = 8\n" +
	"require_tailnet = true\n[[headers]]\nname = \"anthropic-BETA\"\nvalue = \"a, b\"\n[[headers]]\nname = \"x-thing\"\nvalue = \"1, 2\"\n"

// TestConfig: the runbook's and the specification's defaults, and each key has its field.
func TestConfig(t *testing.T) {
	for text, want := range map[string]*config{
		"": {
			hostname: "anthropic-oauth-proxy", socket: "/var/run/tailscale/tailscaled.sock", listenAddr: "0.0.0.0:8080", upstream: &url.URL{Scheme: "https", Host: "api.anthropic.com"},
			timeout: 60 * time.Second, timeoutRetries: 2, honorClientTimeout: true, connectTimeout: 5 * time.Second, maxConnections: 1000,
			maxBody: 10 << 20, bodyMemory: 48 << 20, drainTimeout: 5 * time.Second,
			headers: []header{{"Anthropic-Beta", []string{"oauth-2025-04-20"}}},
		},
		settings: {
			hostname: "h", socket: "/s", capability: "example.com/cap/x", proxyProtocolAddr: "127.0.0.2:0", healthAddr: ":8081", listenAddr: "[::1]:0", upstream: &url.URL{Scheme: "http", Host: "localhost:81", Path: "/a/b", RawPath: "/a%2Fb"},
			timeout: time.Second, timeoutRetries: 3, connectTimeout: 4 * time.Second, maxConnections: 5,
			maxBody: 6 << 20, bodyMemory: 7 << 20, drainTimeout: 8 * time.Second, requireTailnet: true,
			headers: []header{{"Anthropic-Beta", []string{"a", "b"}}, {"X-Thing", []string{"1, 2"}}},
		},
	} {
		equal(t, text, testConfig(t, text, overrides{}), want)
	}
}

// TestRanges: the ends of each range are in it, what is beyond is refused, and so is what is no whole number.
func TestRanges(t *testing.T) {
	for _, row := range []struct {
		key      string
		min, max int64
		other    string // a line that keeps the rest valid
	}{
		{key: "timeout_secs", min: 1, max: 3600},
		{key: "timeout_retries", min: 0, max: 10},
		{key: "connect_timeout_secs", min: 1, max: 300},
		{key: "max_connections", min: 1, max: 100_000},
		{key: "max_body_mb", min: 1, max: 1024, other: "body_memory_mb = 65536"},
		{key: "body_memory_mb", min: 1, max: 65_536, other: "max_body_mb = 1"},
		{key: "drain_timeout_secs", min: 0, max: 3600},
	} {
		refusal := fmt.Sprintf("c.toml:3:%d: proxy.%s must be a whole number from %d to %d", len(row.key)+4, row.key, row.min, row.max)
		for value, want := range map[string]string{
			fmt.Sprint(row.min): "", fmt.Sprint(row.max): "",
			fmt.Sprint(row.min - 1): refusal, fmt.Sprint(row.max + 1): refusal,
			"9223372036854775807": refusal, "-9223372036854775808": refusal, `"1"`: refusal, "true": refusal,
		} {
			_, err := parseConfig("c.toml", fmt.Appendf(nil, "[proxy]\n%s\n%s = %s\n", row.other, row.key, value), overrides{})
			equal(t, row.key+" = "+value, errorText(err), want)
		}
	}
}

// TestConfigRefused: every problem is found, told with its place and what to do, and in file order.
func TestConfigRefused(t *testing.T) {
	const (
		noCapability = " is not the name of an app capability: write it as in the grant, such as example.com/cap/claude"
		notLoopback  = " is not a loopback address with a port: whoever reaches it could claim to be anybody; write 127.0.0.2:8082"
		noPort       = " has no port from 0 to 65535: write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080"
		notAbsolute  = " is not an absolute http or https URL: write one such as https://api.anthropic.com"
		query        = " has a query or fragment, which requests can't be appended to: leave it out"
		needs        = "each of headers needs a name and a value"
		reserved     = " can't be injected, as it belongs to the client or to the connection: remove the entry"
		noName       = " is not a header name: write letters, digits and hyphens"
		control      = "the value of the header a has control characters, or blanks at its ends: remove them"
	)
	withHeader := func(name, value string) string { return "[[headers]]\nname = " + name + "\nvalue = " + value }
	for _, row := range []struct {
		text      string
		overrides overrides
		want      []string // problems; of those in the file, the place is in c.toml
	}{
		{text: "prox = 1\n[tailscale]\nhostnam = 'x'\n[proxy]\ntimeout_sec = 1\nfrobnicate = 1\nupstream = 'x'\nretries = 1\ntimeout = 1\n[[headers]]\nname = 'a'\nvalues = 'b'\n[nothing-like-it]\n", want: []string{
			"1:1: unknown key prox: did you mean proxy?", "3:1: unknown key tailscale.hostnam: did you mean hostname?", "5:1: unknown key proxy.timeout_sec: did you mean timeout_secs?",
			"6:1: unknown key proxy.frobnicate: known here: listen_addr, upstream_url, timeout_secs, timeout_retries, honor_client_timeout, connect_timeout_secs, proxy_protocol_addr, health_addr, max_connections, max_body_mb, body_memory_mb, drain_timeout_secs, require_tailnet",
			"7:1: unknown key proxy.upstream: did you mean upstream_url?", "8:1: unknown key proxy.retries: did you mean timeout_retries?", "9:1: unknown key proxy.timeout: did you mean timeout_secs?",
			"10:3: " + needs, "12:1: unknown key headers.values: did you mean value?", "13:2: unknown key nothing-like-it: known here: headers, tailscale, proxy"}},
		// Syntax and meaning, in file order.
		{text: "[proxy]\ntimeout_secs = 0\nmax_connections = \nrequire_tailnet = 'yes'\nlisten_addr = 8080\nupstream_url = 'ftp://x'\nmax_body_mb = 20\nbody_memory_mb = 10\n", want: []string{
			"2:16: proxy.timeout_secs must be a whole number from 1 to 3600", "3:19: found the end of the line, expected a value", "4:19: proxy.require_tailnet must be true or false",
			"5:15: proxy.listen_addr must be a string: put it in quotes", `6:16: proxy.upstream_url "ftp://x"` + notAbsolute,
			"8:18: proxy.body_memory_mb (10) must be at least proxy.max_body_mb (20), or the largest body could never be read"}},
		{text: "proxy.max_body_mb = 49", want: []string{"1:21: proxy.body_memory_mb (48) must be at least proxy.max_body_mb (49), or the largest body could never be read"}},
		{text: "proxy = 1\nheaders = 'x'\n[[tailscale]]", want: []string{
			"1:1: proxy is a table: write [proxy] on a line of its own and its settings below", "2:1: headers must be an array of tables: write [[headers]], then name and value below",
			"3:3: tailscale is a table: write [tailscale] on a line of its own and its settings below"}},
		{text: "[[headers]]\nname = 1\nvalue = ''\n[[headers]]\nname = 'a'\n[[headers]]\n[[headers]]\nname = a\n", want: []string{
			"2:8: headers.name must be a string: put it in quotes", "4:3: " + needs, "6:3: " + needs,
			"8:8: unknown value `a`: write \"a\" for text, true or false in lower case, and one setting on a line"}},
		{text: "[tailscale]\nsocket = ''", want: []string{"2:10: tailscale.socket is empty: give the path of tailscaled's socket, by default /var/run/tailscale/tailscaled.sock"}},
		{text: "[proxy]\nrequire_tailnet = true", overrides: overrides{local: true}, want: []string{"2:19: proxy.require_tailnet contradicts -local, which has no tailnet: leave one of them out"}},
		{text: "[tailscale]\ncapability = 'a.b/c'\n[proxy]\nproxy_protocol_addr = '[::1]:1'", overrides: overrides{local: true}, want: []string{
			"2:14: tailscale.capability contradicts -local, which has no tailnet: leave one of them out", "4:23: proxy.proxy_protocol_addr contradicts -local, which has no tailnet: leave one of them out"}},
		// Flags have no place in the file.
		{text: "[proxy]\nlisten_addr = 'also wrong'\ntimeout_secs = 0", overrides: overrides{listen: "8080", upstream: "x"}, want: []string{
			`proxy.upstream_url "x"` + notAbsolute, `proxy.listen_addr "8080"` + noPort, "3:16: proxy.timeout_secs must be a whole number from 1 to 3600"}},

		{text: "proxy.listen_addr = 'localhost'", want: []string{`1:21: proxy.listen_addr "localhost"` + noPort}},
		{text: "proxy.proxy_protocol_addr = '0.0.0.0:1'", want: []string{`1:29: proxy.proxy_protocol_addr "0.0.0.0:1"` + notLoopback}},
		{text: "proxy.proxy_protocol_addr = 'localhost:1'", want: []string{`1:29: proxy.proxy_protocol_addr "localhost:1"` + notLoopback}},
		{text: "proxy.proxy_protocol_addr = '127.0.0.2'", want: []string{`1:29: proxy.proxy_protocol_addr "127.0.0.2"` + notLoopback}},
		{text: "proxy.proxy_protocol_addr = '100.64.0.1:1'", want: []string{`1:29: proxy.proxy_protocol_addr "100.64.0.1:1"` + notLoopback}},
		{text: "tailscale.capability = 'claude'", want: []string{`1:24: tailscale.capability "claude"` + noCapability}},
		{text: "tailscale.capability = 'example/cap'", want: []string{`1:24: tailscale.capability "example/cap"` + noCapability}},
		{text: "tailscale.capability = 'https://example.com/x'", want: []string{`1:24: tailscale.capability "https://example.com/x"` + noCapability}},
		{text: "tailscale.capability = 'example.com/'", want: []string{`1:24: tailscale.capability "example.com/"` + noCapability}},
		{text: "proxy.health_addr = '8081'", want: []string{`1:21: proxy.health_addr "8081"` + noPort}},
		{text: "proxy.listen_addr = ':http'", want: []string{`1:21: proxy.listen_addr ":http"` + noPort}},
		{text: "proxy.listen_addr = ':65536'", want: []string{`1:21: proxy.listen_addr ":65536"` + noPort}},
		{text: "proxy.upstream_url = ''", want: []string{`1:22: proxy.upstream_url ""` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://:443/x'", want: []string{`1:22: proxy.upstream_url "https://:443/x"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://h:/x'", want: []string{`1:22: proxy.upstream_url "https://h:/x"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://h:0'", want: []string{`1:22: proxy.upstream_url "https://h:0"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://h:65536'", want: []string{`1:22: proxy.upstream_url "https://h:65536"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https:h'", want: []string{`1:22: proxy.upstream_url "https:h"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://h/%zz'", want: []string{`1:22: proxy.upstream_url "https://h/%zz"` + notAbsolute}},
		{text: "proxy.upstream_url = 'ftp://u:secret@h/?key=secret'", want: []string{`1:22: proxy.upstream_url "…"` + notAbsolute}},
		{text: "proxy.upstream_url = 'u:sec?ret@h'", want: []string{`1:22: proxy.upstream_url "…"` + notAbsolute}},
		{text: "proxy.upstream_url = 'https://u:secret@h'", want: []string{"1:22: proxy.upstream_url has a user or password in it: leave them out, the proxy holds no credentials"}},
		{text: "proxy.upstream_url = 'https://h/?a=secret'", want: []string{`1:22: proxy.upstream_url "https://h/"` + query}},
		{text: "proxy.upstream_url = 'https://h?'", want: []string{`1:22: proxy.upstream_url "https://h"` + query}},
		{text: "proxy.upstream_url = 'https://h/#x'", want: []string{`1:22: proxy.upstream_url "https://h/#x"` + query}},

		{text: withHeader("'authorization'", "'x'"), want: []string{"2:8: the header authorization" + reserved}},
		{text: withHeader("'HOST'", "'x'"), want: []string{"2:8: the header HOST" + reserved}},
		{text: withHeader("'content-length'", "'1'"), want: []string{"2:8: the header content-length" + reserved}},
		{text: withHeader("'tE'", "'x'"), want: []string{"2:8: the header tE" + reserved}},
		{text: withHeader("''", "'x'"), want: []string{`2:8: headers.name ""` + noName}},
		{text: withHeader("'é'", "'x'"), want: []string{`2:8: headers.name "é"` + noName}},
		{text: withHeader("'a'", `"x\r\nb: c"`), want: []string{"3:9: " + control}},
		{text: withHeader("'a'", `"\u007f"`), want: []string{"3:9: " + control}},
		{text: withHeader("'a'", "'x '"), want: []string{"3:9: " + control}},
		{text: withHeader("'anthropic-beta'", "'a,,b'"), want: []string{"3:9: the value of the header anthropic-beta has an empty element: remove a comma"}},
		{text: withHeader("'a'", "'1'") + "\n" + withHeader("'A'", "'2'"), want: []string{"5:8: the header A is given twice: keep one entry (several betas are one value with commas)"}},
	} {
		cfg, err := parseConfig("c.toml", []byte(row.text), row.overrides)
		equal(t, "the problems in\n"+row.text, strings.ReplaceAll(errorText(err), "c.toml:", ""), strings.Join(row.want, "\n"))
		equal(t, "the configuration", cfg, nil)
	}
}

// TestConfigWarnings: what is accepted, but should be looked at.
func TestConfigWarnings(t *testing.T) {
	const noBeta = "no [[headers]] entry injects anthropic-beta: the API refuses OAuth tokens without oauth-2025-04-20 in it"
	plain := func(url string) string {
		return "proxy.upstream_url " + url + " is plain http: bearer tokens would cross the network in clear text; use https"
	}
	for _, row := range []struct {
		text      string
		overrides overrides
		want      []string
	}{
		{text: "[proxy]\ntimeout_secs = 5"},
		{text: "[tailscale]\nhostname = \"anthropic-oauth-proxy\"\nauth_key_file = \"/run/key\"\nstate_dir = \"/data\"\n", want: []string{ // a file of the predecessor
			"c.toml:3:1: tailscale.auth_key_file is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line",
			"c.toml:4:1: tailscale.state_dir is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line"}},
		{text: "[proxy]\nupstream_url = 'http://h:81'", want: []string{"c.toml:2:16: " + plain("http://h:81")}},
		{overrides: overrides{upstream: "http://10.0.0.1"}, want: []string{plain("http://10.0.0.1")}},
		{overrides: overrides{upstream: "http://localhost.example.com"}, want: []string{plain("http://localhost.example.com")}},
		{overrides: overrides{upstream: "http://127.1.2.3:1"}}, {overrides: overrides{upstream: "http://[::1]:1"}}, {overrides: overrides{upstream: "http://localhost"}},
		{text: "[[headers]]\nname = 'a'\nvalue = ''", want: []string{"c.toml:1:3: " + noBeta}},
	} {
		equal(t, "the warnings about\n"+row.text, testConfig(t, row.text, row.overrides).warnings, row.want)
	}
}

// TestOverrides: flags win over the environment, that over the file, that over the defaults; -listen
// wins over -local, and that over the file.
func TestOverrides(t *testing.T) {
	const file = "[tailscale]\nsocket = '/file'\n[proxy]\nlisten_addr = 'file:1'\nupstream_url = 'https://file'"
	for name, row := range map[string]struct {
		text      string
		overrides overrides
		want      string // listen_addr, upstream_url and socket
	}{
		"defaults":                       {want: defaultListen + " " + defaultUpstream + " " + defaultSocket},
		"file":                           {text: file, want: "file:1 https://file /file"},
		"-listen":                        {text: file, overrides: overrides{listen: "flag:2"}, want: "flag:2 https://file /file"},
		"-upstream and TAILSCALE_SOCKET": {text: file, overrides: overrides{upstream: "https://flag", socket: "/env"}, want: "file:1 https://flag /env"},
		"-local":                         {text: file, overrides: overrides{local: true}, want: "127.0.0.1:8080 https://file /file"},
		"-listen over -local":            {text: file, overrides: overrides{local: true, listen: "flag:2"}, want: "flag:2 https://file /file"},
	} {
		cfg := testConfig(t, row.text, row.overrides)
		equal(t, name, fmt.Sprintf("%s %v %s", cfg.listenAddr, cfg.upstream, cfg.socket), row.want)
		equal(t, name+": without a tailnet", cfg.local, row.overrides.local)
	}
}

// TestLoadConfig: a file that is named must be there, readable and no larger than 1 MiB. An empty text is not written; want is in the error.
func TestLoadConfig(t *testing.T) {
	const text = "tailscale.hostname = 'x' #"
	dir := t.TempDir()
	const unreadable = "name an existing, readable file with -config or CONFIG_PATH"
	for name, row := range map[string]struct{ text, want string }{
		"good":               {text: text},
		"bad":                {text: "x", want: "bad:1:2: "},
		"missing":            {want: unreadable},
		"as large as may be": {text: text + strings.Repeat("x", 1<<20-len(text))},
		"too large":          {text: text + strings.Repeat("x", 1<<20+1-len(text)), want: " is larger than 1 MiB"},
		".":                  {want: unreadable}, // a folder
	} {
		path := filepath.Join(dir, name)
		if row.text != "" {
			equal(t, path, os.WriteFile(path, []byte(row.text), 0o600), nil)
		}
		cfg, found, err := loadConfig(overrides{path: path})
		if row.want == "" {
			holds(t, err == nil && found && cfg.hostname == "x", "%s: %+v, %t, %v", name, cfg, found, err)
		} else {
			holds(t, strings.Contains(errorText(err), row.want) && exitCode(err) == 2, "%s: the error is %v, want one with %q", name, err, row.want)
		}
	}
}

// TestConfigRoundTrip: what -check-config prints is read back as the same configuration.
func TestConfigRoundTrip(t *testing.T) {
	texts := []string{"", settings}
	for key, values := range map[string][]string{
		"tailscale.hostname":               {"x", `a"b\c`, "tab\tnl\n", "é\x7f😀", "'''", "# not a comment"},
		"[[headers]]\nname = 'X-a'\nvalue": {"", `"\`, "é\tx", "x, y"},
		"proxy.listen_addr":                {":0", "[::]:65535", "host:1", "[fe80::1%eth0]:80"},
		"proxy.upstream_url": {"https://h", "HTTPS://H/", "http://[::1]:8/a/", "https://h/a%2Fb//", "https://h/a b", "https://h/é|*",
			"https://h//x", "https://h/a%3Fb%23", "https://h/;x=1", "http://[fe80::1%25eth0]:80/"},
	} {
		for _, value := range values {
			texts = append(texts, key+" = "+quoteTOML(value))
		}
	}
	for _, text := range texts {
		first := testConfig(t, text, overrides{})
		second := testConfig(t, first.toml(), overrides{})
		first.warnings, second.warnings = nil, nil
		equal(t, text, second, first)
		equal(t, text, second.toml(), first.toml())
	}
}
