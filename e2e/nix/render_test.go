//go:build nix

// Package nix holds nix/yaml.nix and nix/toml.nix against real parsers: thousands of values, among them all that a YAML reader
// likes to take for something else, are rendered by Nix, and have to come back. It needs nix on PATH, or its path in NIX:
//
//	go -C e2e test -count=1 -tags nix ./nix
package nix

import (
	"cmp"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"

	"github.com/BurntSushi/toml"
	yaml12 "gopkg.in/yaml.v3"
	yaml11 "sigs.k8s.io/yaml"
)

// TestRender: what the files' function render makes is read as what it was made of; YAML as kubectl does (1.1), and as YAML 1.2.
func TestRender(t *testing.T) {
	exact := func(text []byte, v any) error { // integers of any size
		return yaml11.Unmarshal(text, v, func(d *json.Decoder) *json.Decoder {
			d.UseNumber()
			return d
		})
	}
	for _, f := range []struct {
		file    string
		config  bool // is all that it can hold
		parsers map[string]func([]byte, any) error
	}{
		{"yaml.nix", false, map[string]func([]byte, any) error{"YAML 1.1": exact, "YAML 1.2": yaml12.Unmarshal}},
		{"toml.nix", true, map[string]func([]byte, any) error{"TOML": toml.Unmarshal}},
	} {
		t.Run(f.file, func(t *testing.T) {
			g := &generator{rand.New(rand.NewPCG(1, 0)), f.config}
			values := g.list(3000, func() any {
				if f.config {
					return g.table(3)
				}
				return g.value(4)
			})
			for i, text := range render(t, f.file, values) {
				for parser, parse := range f.parsers {
					var read any
					err := parse([]byte(text), &read)
					if got, want := canonical(read), canonical(values[i]); err != nil || got != want {
						t.Fatalf("value %d: %s reads\n%s\nas\n%s\ninstead of\n%s\n%v", i, parser, text, got, want, err)
					}
				}
			}
		})
	}
}

// render has Nix render values with a file of nix/.
func render(t *testing.T, file string, values []any) (texts []string) {
	t.Helper()
	program := proxytest.Must(filepath.Abs(filepath.Join("../../nix", file)))(t)
	input := filepath.Join(t.TempDir(), "values.json")
	proxytest.Check(t, os.WriteFile(input, proxytest.Must(json.Marshal(values))(t), 0o600))
	expression := fmt.Sprintf("map (import %s).render (builtins.fromJSON (builtins.readFile %s))", program, input)
	cmd := exec.Command(cmp.Or(os.Getenv("NIX"), "nix"),
		"--extra-experimental-features", "nix-command", "eval", "--impure", "--json", "--expr", expression)
	cmd.Stderr = os.Stderr
	proxytest.Check(t, json.Unmarshal(proxytest.Must(cmd.Output())(t), &texts))
	if len(texts) != len(values) {
		t.Fatalf("Nix rendered %d of %d values", len(texts), len(values))
	}
	return texts
}

// canonical writes a value so that equal values of any parser are equal texts.
func canonical(value any) string {
	text, err := json.Marshal(value)
	return fmt.Sprint(string(text), err)
}

// A generator makes values that JSON can carry into Nix: no NUL, which Nix has no strings with, and no numbers that a JSON reader
// rounds. For a configuration they are texts, integers, booleans, tables and lists of tables.
type generator struct {
	*rand.Rand
	config bool
}

// value makes a value with at most so many levels of collections.
func (g *generator) value(depth int) any {
	switch n := g.IntN(10); {
	case n < 3 && depth > 0:
		return g.table(depth - 1)
	case n < 5 && depth > 0 && g.config:
		return g.list(1+g.IntN(3), func() any { return g.table(depth - 1) })
	case n < 5 && depth > 0:
		return g.list(g.IntN(5), func() any { return g.value(depth - 1) })
	case n == 5 && !g.config:
		return nil
	case n == 6 && !g.config:
		return float64(g.IntN(1<<20))/64 + 1.0/128 // exact in few digits, and never integral
	case n == 7:
		return g.IntN(2) == 0
	case n == 8:
		return g.Int64() >> g.IntN(63) * (1 - 2*g.Int64N(2))
	default:
		return g.text()
	}
}

func (g *generator) table(depth int) map[string]any {
	m := map[string]any{}
	for range g.IntN(5) {
		key := []rune(g.text())
		m[string(key[:min(len(key), 60)])] = g.value(depth) // YAML limits keys to 1024 characters
	}
	return m
}

func (g *generator) list(n int, element func() any) []any {
	list := make([]any, n)
	for i := range list {
		list[i] = element()
	}
	return list
}

// text makes a string: a suspicious one, several of those, in a row or in lines, a long one, or any characters at all.
func (g *generator) text() string {
	var b strings.Builder
	switch g.IntN(7) {
	case 0, 1:
		return suspects[g.IntN(len(suspects))]
	case 2, 3, 4:
		for range 1 + g.IntN(5) {
			b.WriteString(suspects[g.IntN(len(suspects))] + strings.Repeat("\n", max(0, g.IntN(5)-2)))
		}
	case 5:
		return strings.Repeat("a-Z_0 "[:1+g.IntN(6)], g.IntN(2000))
	default:
		for range g.IntN(12) {
			planes := [][2]int{{1, 0x7f}, {0x80, 0xff}, {0x100, 0xd7ff}, {0xe000, 0x10ffff}} // without surrogates
			plane := planes[g.IntN(len(planes))]
			b.WriteRune(rune(plane[0] + g.IntN(plane[1]-plane[0]+1)))
		}
	}
	return b.String()
}

// suspects are texts that some reader takes for something else, characters that have caused trouble, and harmless ones that
// ought to stay plain.
var suspects = strings.Split("|~|null|Null|NULL|nuLL|true|True|TRUE|false|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|y|Y|n|N|"+
	"0|-0|+1|017|0o17|0x1F|0b11|1_000|1e3|1E-3|.5|-.5|5.|.inf|-.Inf|.NAN|nan|inf|infinity|1.2.3|0.1.0|2001-01-01|2001-01-01T00:00:00Z|12:30|"+
	"-|- a|--|---|...|?|? a|:|: a|a:|a: b|a:b|a ::b|#|a #b|a#b|,|[|]|{|}|{}|[]|&|&a|*|*a|!|!!str|!a|>|>-|%|%TAG|@|@a|`|'|''|'a'|\"|\"\"|\"a\"|"+
	"\\|\\n|\\u0041|a\\|<<|=|a=b|$(A)|${a}|/|/a/b|a/b.c|https://example.com:8080/a?b=c#d|-a|--flag=x|a, b|\t|a\tb|\r|\r\n|a\rb| |  |a b|é|日本|"+
	"3|08|31415|59:1:0|3.1e4|512m|128Mi|96MiB|2Gi|4k|5e|6E3|7_0|   indented|trailing  |"+
	"\u2029|\ufeff|\ufffd|\ufffe|\uffff|\u200b|\u00a0|\U0001f600|\U0001fffe|\U0010ffff|\ud7ff|\ue000|"+
	"\u0085|\u2028|\ufeffa|\x7f|\x1b[0m|\x01|anthropic-oauth-proxy|app.kubernetes.io/name|ghcr.io/a/b:v1.2.3|a@sha256:0123|0.0.0.0:8080|[::]:8080", "|")
