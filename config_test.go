package main

import (
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
		hostname:           "anthropic-oauth-proxy",
		socket:             "/var/run/tailscale/tailscaled.sock",
		listenAddr:         "0.0.0.0:8080",
		timeout:            60 * time.Second,
		timeoutRetries:     2,
		honorClientTimeout: true,
		connectTimeout:     5 * time.Second,
		maxConnections:     1000,
		maxBody:            10 << 20,
		bodyMemory:         48 << 20,
		drainTimeout:       5 * time.Second,
		headers:            []header{{name: "Anthropic-Beta", values: []string{"oauth-2025-04-20"}}},
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
			"9223372036854775807": refusal, "1.0": refusal, `"1"`: refusal, "true": refusal, "[1]": refusal,
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
	const (
		notAbsolute = "is not an absolute http or https URL: write one such as https://api.anthropic.com"
		listenHint  = ": write HOST:PORT, such as 0.0.0.0:8080 or [::]:8080"
	)
	upstream := func(url, want string) (string, []string) {
		return "[proxy]\nupstream_url = '" + url + "'", []string{"c.toml:2:16: " + want}
	}
	injected := func(name, value, want string) (string, []string) {
		return "[[headers]]\nname = " + name + "\nvalue = " + value, []string{"c.toml:1:3: " + want}
	}
	for _, row := range []struct {
		name      string
		text      func() (string, []string) // the file, and the problems that must be found in it
		overrides overrides
	}{
		{name: "unknown keys", text: func() (string, []string) {
			return "prox = 1\n[tailscale]\nhostnam = 'x'\n[proxy]\ntimeout_sec = 1\nfrobnicate = 1\n[[headers]]\nname = 'a'\nvalues = 'b'\n[nothing-like-it]\n", []string{
				"c.toml:1:1: unknown key prox: did you mean proxy?",
				"c.toml:3:1: unknown key tailscale.hostnam: did you mean hostname?",
				"c.toml:5:1: unknown key proxy.timeout_sec: did you mean timeout_secs?",
				"c.toml:6:1: unknown key proxy.frobnicate: known here: body_memory_mb, connect_timeout_secs, drain_timeout_secs, honor_client_timeout, listen_addr, max_body_mb, max_connections, require_tailnet, timeout_retries, timeout_secs, upstream_url",
				"c.toml:7:3: each of headers needs a name and a value",
				"c.toml:9:1: unknown key headers.values: did you mean value?",
				"c.toml:10:2: unknown key nothing-like-it: known here: tailscale, proxy, headers",
			}
		}},
		{name: "syntax and meaning, in file order", text: func() (string, []string) {
			return "[proxy]\ntimeout_secs = 0\nmax_connections = \nrequire_tailnet = 'yes'\nlisten_addr = 8080\nupstream_url = 'ftp://x'\nmax_body_mb = 20\nbody_memory_mb = 10\n", []string{
				"c.toml:2:16: proxy.timeout_secs must be a whole number from 1 to 3600",
				"c.toml:3:19: found the end of the line, expected a value",
				"c.toml:4:19: proxy.require_tailnet must be true or false",
				"c.toml:5:15: proxy.listen_addr must be a string: put it in quotes",
				`c.toml:6:16: the upstream "ftp://x" ` + notAbsolute,
				"c.toml:8:18: proxy.body_memory_mb (10) must be at least proxy.max_body_mb (20), or the largest body could never be read",
			}
		}},
		{name: "body memory by default too small", text: func() (string, []string) {
			return "proxy.max_body_mb = 49", []string{"c.toml:1:21: proxy.body_memory_mb (48) must be at least proxy.max_body_mb (49), or the largest body could never be read"}
		}},
		{name: "tables that are none", text: func() (string, []string) {
			return "proxy = 1\ntailscale = []\nheaders = 'x'", []string{
				"c.toml:1:1: proxy is a table: write [proxy] on a line of its own and its settings below",
				"c.toml:2:1: tailscale is a table: write [tailscale] on a line of its own and its settings below",
				"c.toml:3:1: headers must be an array of tables: write [[headers]], then name and value below",
			}
		}},
		{name: "headers that are none", text: func() (string, []string) {
			return "headers = [1, {name = 1, value = ''}, {name = 'a'}, {}]", []string{
				"c.toml:1:12: each of headers must be a table with name and value",
				"c.toml:1:23: headers.name must be a string: put it in quotes",
				"c.toml:1:39: each of headers needs a name and a value",
				"c.toml:1:53: each of headers needs a name and a value",
			}
		}},
		{name: "empty socket", text: func() (string, []string) {
			return "[tailscale]\nsocket = ''", []string{"c.toml:2:10: tailscale.socket is empty: give the path of tailscaled's socket, by default /var/run/tailscale/tailscaled.sock"}
		}},
		{name: "-local with require_tailnet", overrides: overrides{local: true}, text: func() (string, []string) {
			return "[proxy]\nrequire_tailnet = true", []string{"c.toml:2:19: proxy.require_tailnet contradicts -local, which has no tailnet: leave one of them out"}
		}},
		{name: "flags have no place in the file", overrides: overrides{listen: "8080", upstream: "x"}, text: func() (string, []string) {
			return "[proxy]\nlisten_addr = 'also wrong'\ntimeout_secs = 0", []string{
				`the upstream "x" ` + notAbsolute,
				`the listen address "8080" has no port` + listenHint,
				"c.toml:3:16: proxy.timeout_secs must be a whole number from 1 to 3600",
			}
		}},

		{name: "listen without a port", text: func() (string, []string) {
			return "[proxy]\nlisten_addr = 'localhost'", []string{`c.toml:2:15: the listen address "localhost" has no port` + listenHint}
		}},
		{name: "listen on a named port", text: func() (string, []string) {
			return "[proxy]\nlisten_addr = ':http'", []string{`c.toml:2:15: the listen address ":http" has a port that is not a number from 0 to 65535` + listenHint}
		}},
		{name: "listen beyond the ports", text: func() (string, []string) {
			return "[proxy]\nlisten_addr = ':65536'", []string{`c.toml:2:15: the listen address ":65536" has a port that is not a number from 0 to 65535` + listenHint}
		}},

		{name: "upstream: relative", text: func() (string, []string) { return upstream("/v1", `the upstream "/v1" `+notAbsolute) }},
		{name: "upstream: no scheme", text: func() (string, []string) {
			return upstream("api.example.com", `the upstream "api.example.com" `+notAbsolute)
		}},
		{name: "upstream: empty", text: func() (string, []string) { return upstream("", `the upstream "" `+notAbsolute) }},
		{name: "upstream: no host", text: func() (string, []string) {
			return upstream("https://:443/x", `the upstream "https://:443/x" `+notAbsolute)
		}},
		{name: "upstream: empty port", text: func() (string, []string) { return upstream("https://h:/x", `the upstream "https://h:/x" `+notAbsolute) }},
		{name: "upstream: port 0", text: func() (string, []string) { return upstream("https://h:0", `the upstream "https://h:0" `+notAbsolute) }},
		{name: "upstream: port too high", text: func() (string, []string) {
			return upstream("https://h:65536", `the upstream "https://h:65536" `+notAbsolute)
		}},
		{name: "upstream: opaque", text: func() (string, []string) { return upstream("https:h", `the upstream "https:h" `+notAbsolute) }},
		{name: "upstream: can't be parsed", text: func() (string, []string) {
			return upstream("https://h/%zz", `the upstream "https://h/%zz" `+notAbsolute)
		}},
		{name: "upstream: user", text: func() (string, []string) {
			return upstream("https://u:secret@h", "the upstream has a user or password in it: leave them out, the proxy holds no credentials")
		}},
		{name: "upstream: secrets are not shown", text: func() (string, []string) {
			return upstream("ftp://u:secret@h/?key=secret", `the upstream "ftp://…@h/" `+notAbsolute)
		}},
		{name: "upstream: query", text: func() (string, []string) {
			return upstream("https://h/?a=secret", `the upstream "https://h/" has a query or fragment, which requests can't be appended to: leave it out`)
		}},
		{name: "upstream: empty query", text: func() (string, []string) {
			return upstream("https://h?", `the upstream "https://h" has a query or fragment, which requests can't be appended to: leave it out`)
		}},
		{name: "upstream: fragment", text: func() (string, []string) {
			return upstream("https://h/#x", `the upstream "https://h/#x" has a query or fragment, which requests can't be appended to: leave it out`)
		}},

		{name: "header: authorization", text: func() (string, []string) {
			return injected("'authorization'", "'x'", "the header authorization can't be injected: it belongs to the client or to the connection")
		}},
		{name: "header: host", text: func() (string, []string) {
			return injected("'HOST'", "'x'", "the header HOST can't be injected: it belongs to the client or to the connection")
		}},
		{name: "header: content-length", text: func() (string, []string) {
			return injected("'content-length'", "'1'", "the header content-length can't be injected: it belongs to the client or to the connection")
		}},
		{name: "header: hop by hop", text: func() (string, []string) {
			return injected("'tE'", "'x'", "the header tE can't be injected: it belongs to the client or to the connection")
		}},
		{name: "header: empty name", text: func() (string, []string) { return injected("''", "'x'", `"" is not a header name`) }},
		{name: "header: blank in the name", text: func() (string, []string) { return injected("'a b'", "'x'", `"a b" is not a header name`) }},
		{name: "header: colon in the name", text: func() (string, []string) { return injected("'a:'", "'x'", `"a:" is not a header name`) }},
		{name: "header: name beyond ASCII", text: func() (string, []string) { return injected("'é'", "'x'", `"é" is not a header name`) }},
		{name: "header: line feed in the value", text: func() (string, []string) {
			return injected("'a'", `"x\r\nb: c"`, "the value of the header a has control characters, or blanks at its ends")
		}},
		{name: "header: DEL in the value", text: func() (string, []string) {
			return injected("'a'", `"\u007f"`, "the value of the header a has control characters, or blanks at its ends")
		}},
		{name: "header: blank at an end", text: func() (string, []string) {
			return injected("'a'", `'x '`, "the value of the header a has control characters, or blanks at its ends")
		}},
		{name: "header: empty beta", text: func() (string, []string) {
			return injected("'anthropic-beta'", `'a,,b'`, "the value of the header anthropic-beta has an empty element")
		}},
		{name: "header: twice", text: func() (string, []string) {
			return "[[headers]]\nname = 'a'\nvalue = '1'\n[[headers]]\nname = 'A'\nvalue = '2'", []string{"c.toml:4:3: the header A is given twice: keep one entry (several betas are one value with commas)"}
		}},
	} {
		t.Run(row.name, func(t *testing.T) {
			text, want := row.text()
			cfg, err := parseConfig("c.toml", []byte(text), row.overrides)
			problems, _ := err.(configError)
			if !slices.Equal(problems, want) || cfg != nil {
				t.Errorf("problems in\n%s\n\ngot\n%s\n\nwant\n%s", text, errorText(err), strings.Join(want, "\n"))
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
	for path, text := range map[string]string{good: "tailscale.hostname = 'x'", bad: "x"} {
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
	if got := (overrides{}).configPath(); got != "/etc/anthropic-oauth-proxy/config.toml" {
		t.Errorf("the default path is %s", got)
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
	text := func() string { return oneOf("", "x", `a"b\c`, "tab\tnl\n", "é\x7f😀", "'''", "# not a comment") }
	var b strings.Builder
	table := ""
	for _, s := range (&rawConfig{}).settings() {
		if random.IntN(3) == 0 || s.obsolete {
			continue
		}
		in, key, _ := strings.Cut(s.key, ".")
		if in != table {
			fmt.Fprintf(&b, "[%s]\n", in)
			table = in
		}
		switch key {
		case "hostname":
			fmt.Fprintf(&b, "hostname = %s\n", quoteTOML(text()))
		case "socket":
			fmt.Fprintf(&b, "socket = %s\n", quoteTOML("/"+text()))
		case "listen_addr":
			fmt.Fprintf(&b, "listen_addr = %s\n", quoteTOML(oneOf(":0", "[::]:65535", "host:1", "0.0.0.0:8080", "[fe80::1%eth0]:80")))
		case "upstream_url":
			fmt.Fprintf(&b, "upstream_url = %s\n", quoteTOML(oneOf("https://h", "HTTPS://H/", "http://[::1]:8/a/", "https://h/a%2Fb//", "https://h/a b", "https://h/é|*",
				"https://h//x", "https://h/a%3Fb%23", "https://h/;x=1", "http://[fe80::1%25eth0]:80/")))
		case "max_body_mb":
			fmt.Fprintf(&b, "max_body_mb = %d\n", 1+random.Int64N(48))
		case "body_memory_mb":
			fmt.Fprintf(&b, "body_memory_mb = %d\n", 48+random.Int64N(60_000))
		default:
			if _, ok := s.value.(*bool); ok {
				fmt.Fprintf(&b, "%s = %t\n", key, random.IntN(2) == 0)
			} else {
				fmt.Fprintf(&b, "%s = %d\n", key, s.min+random.Int64N(s.max-s.min+1))
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

func TestEditDistance(t *testing.T) {
	for _, row := range []struct {
		a, b string
		want int
	}{
		{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"abc", "abc", 0}, {"abc", "axc", 1}, {"abc", "ac", 1}, {"ac", "abc", 1},
		{"kitten", "sitting", 3}, {"ab", "ba", 2}, {"flaw", "lawn", 2},
	} {
		if got := editDistance(row.a, row.b); got != row.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", row.a, row.b, got, row.want)
		}
	}
}
