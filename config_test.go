package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestDefaults: the runbook's and the specification's numbers, from an empty file and from none.
func TestDefaults(t *testing.T) {
	cfg := testConfig(t, "", overrides{})
	upstream := cfg.upstream.String()
	cfg.upstream = nil
	want := &config{
		hostname: "anthropic-oauth-proxy", socket: "/var/run/tailscale/tailscaled.sock", listenAddr: "0.0.0.0:8080",
		timeout: 60 * time.Second, timeoutRetries: 2, honorClientTimeout: true, connectTimeout: 5 * time.Second, maxConnections: 1000,
		maxBody: 10 << 20, bodyMemory: 48 << 20, drainTimeout: 5 * time.Second,
		headers: []header{{"Anthropic-Beta", []string{"oauth-2025-04-20"}}},
	}
	if !reflect.DeepEqual(cfg, want) || upstream != "https://api.anthropic.com" {
		t.Errorf("got  %+v, upstream %s\nwant %+v", cfg, upstream, want)
	}
}

// TestSettings sets every key to something else than its default.
func TestSettings(t *testing.T) {
	cfg := testConfig(t, `
[tailscale]
hostname = "h"
socket = "/s"

[proxy]
listen_addr = "[::1]:0"
upstream_url = "http://localhost:81/a%2Fb/"
timeout_secs = 1
timeout_retries = 3
honor_client_timeout = false
connect_timeout_secs = 4
max_connections = 5
max_body_mb = 6
body_memory_mb = 7
drain_timeout_secs = 8
require_tailnet = true

[[headers]]
name = "anthropic-BETA"
value = "a, b"
[[headers]]
name = "x-thing"
value = "1, 2"
`, overrides{})
	upstream := cfg.upstream.String()
	cfg.upstream = nil
	want := &config{
		hostname: "h", socket: "/s", listenAddr: "[::1]:0",
		timeout: time.Second, timeoutRetries: 3, connectTimeout: 4 * time.Second, maxConnections: 5,
		maxBody: 6 << 20, bodyMemory: 7 << 20, drainTimeout: 8 * time.Second, requireTailnet: true,
		headers: []header{{"Anthropic-Beta", []string{"a", "b"}}, {"X-Thing", []string{"1, 2"}}},
	}
	if !reflect.DeepEqual(cfg, want) || upstream != "http://localhost:81/a%2Fb" {
		t.Errorf("got  %+v, upstream %s\nwant %+v", cfg, upstream, want)
	}
}

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
			if got := errorText(err); got != want {
				t.Errorf("%s = %s: %q, want %q", row.key, value, got, want)
			}
		}
	}
}

// errorText returns an error's text, "" for nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestConfigRefused(t *testing.T) {
	for _, row := range []struct {
		name      string
		text      string
		overrides overrides
		want      []string // the problems that must be found in it
	}{
		{name: "unknown keys",
			text: "prox = 1\n[tailscale]\nhostnam = 'x'\n[proxy]\ntimeout_sec = 1\nfrobnicate = 1\nupstream = 'x'\nretries = 1\ntimeout = 1\n[[headers]]\nname = 'a'\nvalues = 'b'\n[nothing-like-it]\n",
			want: []string{
				"c.toml:1:1: unknown key prox: did you mean proxy?",
				"c.toml:3:1: unknown key tailscale.hostnam: did you mean hostname?",
				"c.toml:5:1: unknown key proxy.timeout_sec: did you mean timeout_secs?",
				"c.toml:6:1: unknown key proxy.frobnicate: known here: listen_addr, upstream_url, timeout_secs, timeout_retries, honor_client_timeout, connect_timeout_secs, max_connections, max_body_mb, body_memory_mb, drain_timeout_secs, require_tailnet",
				"c.toml:7:1: unknown key proxy.upstream: did you mean upstream_url?",
				"c.toml:8:1: unknown key proxy.retries: did you mean timeout_retries?",
				"c.toml:9:1: unknown key proxy.timeout: did you mean timeout_secs?",
				"c.toml:10:3: each of headers needs a name and a value",
				"c.toml:12:1: unknown key headers.values: did you mean value?",
				"c.toml:13:2: unknown key nothing-like-it: known here: headers, tailscale, proxy",
			}},
		{name: "syntax and meaning, in file order",
			text: "[proxy]\ntimeout_secs = 0\nmax_connections = \nrequire_tailnet = 'yes'\nlisten_addr = 8080\nupstream_url = 'ftp://x'\nmax_body_mb = 20\nbody_memory_mb = 10\n",
			want: []string{
				"c.toml:2:16: proxy.timeout_secs must be a whole number from 1 to 3600",
				"c.toml:3:19: found the end of the line, expected a value",
				"c.toml:4:19: proxy.require_tailnet must be true or false",
				"c.toml:5:15: proxy.listen_addr must be a string: put it in quotes",
				`c.toml:6:16: the upstream "ftp://x" is not an absolute http or https URL: write one such as https://api.anthropic.com`,
				"c.toml:8:18: proxy.body_memory_mb (10) must be at least proxy.max_body_mb (20), or the largest body could never be read",
			}},
		{name: "body memory by default too small", text: "proxy.max_body_mb = 49",
			want: []string{"c.toml:1:21: proxy.body_memory_mb (48) must be at least proxy.max_body_mb (49), or the largest body could never be read"}},
		{name: "tables that are none", text: "proxy = 1\nheaders = 'x'\n[[tailscale]]",
			want: []string{
				"c.toml:1:1: proxy is a table: write [proxy] on a line of its own and its settings below",
				"c.toml:2:1: headers must be an array of tables: write [[headers]], then name and value below",
				"c.toml:3:3: tailscale is a table: write [tailscale] on a line of its own and its settings below",
			}},
		{name: "headers that are incomplete", text: "[[headers]]\nname = 1\nvalue = ''\n[[headers]]\nname = 'a'\n[[headers]]\n[[headers]]\nname = a\n",
			want: []string{
				"c.toml:2:8: headers.name must be a string: put it in quotes",
				"c.toml:4:3: each of headers needs a name and a value",
				"c.toml:6:3: each of headers needs a name and a value",
				"c.toml:8:8: unknown value `a`: write \"a\" for text, true or false in lower case, and one setting on a line",
			}},
		{name: "header given twice", text: "[[headers]]\nname = 'a'\nvalue = '1'\n[[headers]]\nname = 'A'\nvalue = '2'",
			want: []string{"c.toml:5:8: the header A is given twice: keep one entry (several betas are one value with commas)"}},
		{name: "credentials in the upstream", text: "proxy.upstream_url = 'https://u:secret@h'",
			want: []string{"c.toml:1:22: the upstream has a user or password in it: leave them out, the proxy holds no credentials"}},
		{name: "empty socket", text: "[tailscale]\nsocket = ''",
			want: []string{"c.toml:2:10: tailscale.socket is empty: give the path of tailscaled's socket, by default /var/run/tailscale/tailscaled.sock"}},
		{name: "-local with require_tailnet", text: "[proxy]\nrequire_tailnet = true", overrides: overrides{local: true},
			want: []string{"c.toml:2:19: proxy.require_tailnet contradicts -local, which has no tailnet: leave one of them out"}},
		{name: "flags have no place in the file", text: "[proxy]\nlisten_addr = 'also wrong'\ntimeout_secs = 0", overrides: overrides{listen: "8080", upstream: "x"},
			want: []string{
				`the upstream "x" is not an absolute http or https URL: write one such as https://api.anthropic.com`,
				`the listen address "8080" has no port from 0 to 65535: write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080`,
				"c.toml:3:16: proxy.timeout_secs must be a whole number from 1 to 3600",
			}},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg, err := parseConfig("c.toml", []byte(row.text), row.overrides)
			problems, _ := err.(configError)
			if !slices.Equal(problems, row.want) || cfg != nil {
				t.Errorf("problems in\n%s\n\ngot\n%s\n\nwant\n%s", row.text, errorText(err), strings.Join(row.want, "\n"))
			}
		})
	}
}

// TestAddressesRefused: the problem must stand where the address does.
func TestAddressesRefused(t *testing.T) {
	const (
		noPort      = " has no port from 0 to 65535: write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080"
		notAbsolute = " is not an absolute http or https URL: write one such as https://api.anthropic.com"
		query       = " has a query or fragment, which requests can't be appended to: leave it out"
	)
	for _, row := range []struct {
		name  string
		key   string
		value string
		shown string // in the problem; the value if empty
		want  string
	}{
		{name: "no port", key: "listen_addr", value: "localhost", want: noPort},
		{name: "listen on a named port", key: "listen_addr", value: ":http", want: noPort},
		{name: "listen beyond the ports", key: "listen_addr", value: ":65536", want: noPort},
		{name: "relative", key: "upstream_url", value: "api.example.com", want: notAbsolute},
		{name: "empty", key: "upstream_url", value: "", want: notAbsolute},
		{name: "no host", key: "upstream_url", value: "https://:443/x", want: notAbsolute},
		{name: "empty port", key: "upstream_url", value: "https://h:/x", want: notAbsolute},
		{name: "port 0", key: "upstream_url", value: "https://h:0", want: notAbsolute},
		{name: "port too high", key: "upstream_url", value: "https://h:65536", want: notAbsolute},
		{name: "opaque", key: "upstream_url", value: "https:h", want: notAbsolute},
		{name: "can't be parsed", key: "upstream_url", value: "https://h/%zz", want: notAbsolute},
		{name: "secrets are not shown", key: "upstream_url", value: "ftp://u:secret@h/?key=secret", shown: "…", want: notAbsolute},
		{name: "secrets without a scheme are not shown", key: "upstream_url", value: "u:sec?ret@h", shown: "…", want: notAbsolute},
		{name: "query", key: "upstream_url", value: "https://h/?a=secret", shown: "https://h/", want: query},
		{name: "empty query", key: "upstream_url", value: "https://h?", shown: "https://h", want: query},
		{name: "fragment", key: "upstream_url", value: "https://h/#x", want: query},
	} {
		t.Run(row.name, func(t *testing.T) {
			what := map[string]string{"listen_addr": "listen address", "upstream_url": "upstream"}[row.key]
			want := fmt.Sprintf("c.toml:2:%d: the %s %q%s", len(row.key)+4, what, cmp.Or(row.shown, row.value), row.want)
			if _, err := parseConfig("c.toml", fmt.Appendf(nil, "[proxy]\n%s = %q", row.key, row.value), overrides{}); errorText(err) != want {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
}

// TestHeadersRefused: the problem must stand where the name or the value does.
func TestHeadersRefused(t *testing.T) {
	const (
		name, value = "2:8: ", "3:9: "
		reserved    = " can't be injected: it belongs to the client or to the connection"
		control     = "the value of the header a has control characters, or blanks at its ends"
	)
	for _, row := range []struct{ name, header, value, want string }{
		{name: "authorization", header: "'authorization'", value: "'x'", want: name + "the header authorization" + reserved},
		{name: "host", header: "'HOST'", value: "'x'", want: name + "the header HOST" + reserved},
		{name: "hop by hop", header: "'tE'", value: "'x'", want: name + "the header tE" + reserved},
		{name: "empty name", header: "''", value: "'x'", want: name + `"" is not a header name`},
		{name: "name beyond ASCII", header: "'é'", value: "'x'", want: name + `"é" is not a header name`},
		{name: "line feed in the value", header: "'a'", value: `"x\r\nb: c"`, want: value + control},
		{name: "DEL in the value", header: "'a'", value: `"\u007f"`, want: value + control},
		{name: "blank at an end", header: "'a'", value: "'x '", want: value + control},
		{name: "empty beta", header: "'anthropic-beta'", value: "'a,,b'", want: value + "the value of the header anthropic-beta has an empty element"},
	} {
		t.Run(row.name, func(t *testing.T) {
			text := "[[headers]]\nname = " + row.header + "\nvalue = " + row.value
			if _, err := parseConfig("c.toml", []byte(text), overrides{}); errorText(err) != "c.toml:"+row.want {
				t.Errorf("got  %v\nwant c.toml:%s", err, row.want)
			}
		})
	}
}

func TestConfigWarnings(t *testing.T) {
	const noBeta = "no [[headers]] entry injects anthropic-beta: the API refuses OAuth tokens without oauth-2025-04-20 in it"
	plain := func(url string) []string {
		return []string{"the upstream " + url + " is plain http: bearer tokens would cross the network in clear text; use https"}
	}
	for _, row := range []struct {
		name      string
		text      string
		overrides overrides
		want      []string
	}{
		{name: "none", text: "[proxy]\ntimeout_secs = 5"},
		{name: "a file of the predecessor", text: "[tailscale]\nhostname = \"anthropic-oauth-proxy\"\nauth_key_file = \"/run/key\"\nstate_dir = \"/data\"\n", want: []string{
			"c.toml:3:1: tailscale.auth_key_file is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line",
			"c.toml:4:1: tailscale.state_dir is ignored: tailscaled owns its state and auth key (TS_STATE_DIR, TS_AUTHKEY); remove the line"}},
		{name: "plain http in the file", text: "[proxy]\nupstream_url = 'http://h:81'", want: []string{"c.toml:2:16: " + plain("http://h:81")[0]}},
		{name: "plain http in a flag", overrides: overrides{upstream: "http://10.0.0.1"}, want: plain("http://10.0.0.1")},
		{name: "plain http to a name that only looks like loopback", overrides: overrides{upstream: "http://localhost.example.com"}, want: plain("http://localhost.example.com")},
		{name: "plain http to 127.1.2.3", overrides: overrides{upstream: "http://127.1.2.3:1"}},
		{name: "plain http to [::1]", overrides: overrides{upstream: "http://[::1]:1"}},
		{name: "plain http to localhost", overrides: overrides{upstream: "http://localhost"}},
		{name: "no beta", text: "[[headers]]\nname = 'a'\nvalue = ''", want: []string{"c.toml:1:3: " + noBeta}},
	} {
		t.Run(row.name, func(t *testing.T) {
			if cfg := testConfig(t, row.text, row.overrides); !slices.Equal(cfg.warnings, row.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(cfg.warnings, "\n"), strings.Join(row.want, "\n"))
			}
		})
	}
}

// TestOverrides: flags win over the environment, that over the file, that over the defaults; -listen
// wins over -local, and that over the file.
func TestOverrides(t *testing.T) {
	const file = "[tailscale]\nsocket = '/file'\n[proxy]\nlisten_addr = 'file:1'\nupstream_url = 'https://file'"
	for _, row := range []struct {
		name                     string
		text                     string
		overrides                overrides
		listen, upstream, socket string
	}{
		{name: "defaults", listen: defaultListen, upstream: defaultUpstream, socket: defaultSocket},
		{name: "file", text: file, listen: "file:1", upstream: "https://file", socket: "/file"},
		{name: "-listen", text: file, overrides: overrides{listen: "flag:2"}, listen: "flag:2", upstream: "https://file", socket: "/file"},
		{name: "-upstream", text: file, overrides: overrides{upstream: "https://flag"}, listen: "file:1", upstream: "https://flag", socket: "/file"},
		{name: "TAILSCALE_SOCKET", text: file, overrides: overrides{socket: "/env"}, listen: "file:1", upstream: "https://file", socket: "/env"},
		{name: "-local", text: file, overrides: overrides{local: true}, listen: "127.0.0.1:8080", upstream: "https://file", socket: "/file"},
		{name: "-local over a wrong file", text: "proxy.listen_addr = 'wrong'", overrides: overrides{local: true}, listen: "127.0.0.1:8080", upstream: defaultUpstream, socket: defaultSocket},
		{name: "-listen over -local", text: file, overrides: overrides{local: true, listen: "flag:2"}, listen: "flag:2", upstream: "https://file", socket: "/file"},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg := testConfig(t, row.text, row.overrides)
			if cfg.listenAddr != row.listen || cfg.upstream.String() != row.upstream || cfg.socket != row.socket || cfg.local != row.overrides.local {
				t.Errorf("listen %s, upstream %s, socket %s, local %t", cfg.listenAddr, cfg.upstream, cfg.socket, cfg.local)
			}
		})
	}
}

func TestLoadConfig(t *testing.T) {
	dir := t.TempDir()
	good, bad, missing := filepath.Join(dir, "good.toml"), filepath.Join(dir, "bad.toml"), filepath.Join(dir, "missing.toml")
	large, larger := filepath.Join(dir, "large.toml"), filepath.Join(dir, "larger.toml")
	text := "tailscale.hostname = 'x' #"
	full := text + strings.Repeat("x", 1<<20-len(text))
	for path, text := range map[string]string{good: text, bad: "x", large: full, larger: full + "x"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, row := range []struct {
		name, path string
		want       string // in the error
	}{
		{name: "good", path: good},
		{name: "bad", path: bad, want: bad + ":1:2: "},
		{name: "named, but missing", path: missing, want: "name an existing, readable file with -config or CONFIG_PATH"},
		{name: "as large as may be", path: large},
		{name: "too large", path: larger, want: larger + " is larger than 1 MiB"},
		{name: "a folder", path: dir, want: "name an existing, readable file with -config or CONFIG_PATH"},
	} {
		t.Run(row.name, func(t *testing.T) {
			cfg, found, err := loadConfig(overrides{path: row.path})
			switch {
			case row.want == "" && (err != nil || !found || cfg.hostname != "x"):
				t.Errorf("%+v, %t, %v", cfg, found, err)
			case row.want != "" && !strings.Contains(errorText(err), row.want):
				t.Errorf("the error is %v, want one with %q", err, row.want)
			case row.want != "" && exitCode(err) != 2:
				t.Errorf("exit code %d, want 2", exitCode(err))
			}
		})
	}
}

// TestConfigRoundTrip: what -check-config prints is read back as the same configuration.
func TestConfigRoundTrip(t *testing.T) {
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 1))
		text := randomConfig(random)
		first, err := parseConfig("first", []byte(text), overrides{})
		if err != nil {
			t.Fatalf("seed %d: %v\n%s", seed, err, text)
		}
		second, err := parseConfig("second", []byte(first.toml()), overrides{})
		if err != nil {
			t.Fatalf("seed %d: the program refuses what it printed: %v\n%s", seed, err, first.toml())
		}
		first.warnings, second.warnings = nil, nil
		if !reflect.DeepEqual(first, second) {
			t.Fatalf("seed %d:\n%s\nbecame\n%+v\nthrough\n%s\nwant\n%+v", seed, text, second, first.toml(), first)
		}
		if again := second.toml(); again != first.toml() {
			t.Fatalf("seed %d: printed again it is\n%s\nnot\n%s", seed, again, first.toml())
		}
	}
}

// randomConfig returns a valid file in which each setting may be given.
func randomConfig(random *rand.Rand) string {
	oneOf := func(values ...string) string { return values[random.IntN(len(values))] }
	var b strings.Builder
	for _, s := range (&config{}).sections(new(string), overrides{}) {
		fmt.Fprintf(&b, "[%s]\n", s.name)
		for _, setting := range s.settings {
			if random.IntN(3) > 0 && !setting.obsolete {
				fmt.Fprintf(&b, "%s = %s\n", setting.key, randomValue(random, setting))
			}
		}
	}
	for i, name := range []string{"anthropic-beta", "x-a", "USER-agent"} {
		if random.IntN(2) == 0 {
			value := []string{oneOf("a", "a,b", " a , b "), oneOf("", `"\`, "é\tx"), "x, y"}[i]
			fmt.Fprintf(&b, "[[headers]]\nname = %s\nvalue = %s\n", quoteTOML(name), quoteTOML(strings.TrimSpace(value)))
		}
	}
	return b.String()
}

// randomValue returns a valid value for a setting.
func randomValue(random *rand.Rand, s setting) string {
	oneOf := func(values ...string) string { return quoteTOML(values[random.IntN(len(values))]) }
	switch s.key {
	case "hostname", "socket":
		return oneOf("x", `a"b\c`, "tab\tnl\n", "é\x7f😀", "'''", "# not a comment")
	case "listen_addr":
		return oneOf(":0", "[::]:65535", "host:1", "0.0.0.0:8080", "[fe80::1%eth0]:80")
	case "upstream_url":
		return oneOf("https://h", "HTTPS://H/", "http://[::1]:8/a/", "https://h/a%2Fb//", "https://h/a b", "https://h/é|*",
			"https://h//x", "https://h/a%3Fb%23", "https://h/;x=1", "http://[fe80::1%25eth0]:80/")
	case "max_body_mb": // body_memory_mb must not be smaller
		return fmt.Sprint(1 + random.Int64N(48))
	case "body_memory_mb":
		return fmt.Sprint(48 + random.Int64N(60_000))
	}
	if s.unit == 0 {
		return fmt.Sprint(random.IntN(2) == 0)
	}
	return fmt.Sprint(s.min + random.Int64N(s.max-s.min+1))
}

func TestDifference(t *testing.T) {
	for _, row := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"ab", "", 2}, {"axc", "abc", 1}, {"abc", "ac", 1}, {"ac", "abc", 1},
		{"kitten", "sitting", 3}, {"ab", "ba", 2}, {"flaw", "lawn", 2}, {"abc", "xxabcxxxxx", 1}, {"ab", "xxab", 2},
	} {
		if got := difference(row.a, row.b); got != row.want {
			t.Errorf("difference(%q, %q) = %d, want %d", row.a, row.b, got, row.want)
		}
	}
}
