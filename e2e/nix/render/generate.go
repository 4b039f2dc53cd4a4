package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
)

// A generator makes values that JSON can carry into Nix: no NUL, which Nix has
// no strings with, and no numbers that a JSON reader rounds.
type generator struct{ *rand.Rand }

func newGenerator(seed uint64) *generator {
	return &generator{rand.New(rand.NewPCG(seed, 0))}
}

// value makes a value with at most so many levels of collections.
func (g *generator) value(depth int) any {
	switch n := g.IntN(10); {
	case n < 3 && depth > 0:
		m := map[string]any{}
		for range g.IntN(5) {
			m[g.key()] = g.value(depth - 1)
		}
		return m
	case n < 5 && depth > 0:
		list := make([]any, g.IntN(5))
		for i := range list {
			list[i] = g.value(depth - 1)
		}
		return list
	case n == 5:
		return nil
	default:
		return g.scalar()
	}
}

// table makes a value that a configuration can hold: texts, integers, booleans,
// tables and lists of tables.
func (g *generator) table(depth int) map[string]any {
	m := map[string]any{}
	for range g.IntN(6) {
		switch n := g.IntN(8); {
		case n == 0 && depth > 0:
			m[g.key()] = g.table(depth - 1)
		case n == 1 && depth > 0:
			tables := make([]any, 1+g.IntN(3))
			for i := range tables {
				tables[i] = g.table(depth - 1)
			}
			m[g.key()] = tables
		default:
			m[g.key()] = g.setting()
		}
	}
	return m
}

// setting makes a scalar that is no float.
func (g *generator) setting() any {
	v := g.scalar()
	for _, float := v.(float64); float; _, float = v.(float64) {
		v = g.scalar()
	}
	return v
}

func (g *generator) scalar() any {
	switch g.IntN(8) {
	case 0:
		return g.IntN(2) == 0
	case 1:
		return g.Int64() >> g.IntN(63) * (1 - 2*g.Int64N(2))
	case 2:
		return float64(g.IntN(1<<20))/64 + 1.0/128 // exact in few digits, and never integral
	default:
		return g.text()
	}
}

// key makes a text short enough for YAML, which limits keys to 1024 characters.
func (g *generator) key() string {
	text := []rune(g.text())
	return string(text[:min(len(text), 60)])
}

// text makes a string: a suspicious one, several of those in a row, lines, a
// long one, or any characters at all.
func (g *generator) text() string {
	switch g.IntN(7) {
	case 0, 1:
		return g.suspect()
	case 2:
		return g.suspect() + g.suspect() + g.suspect()
	case 3, 4:
		var b strings.Builder
		for range 1 + g.IntN(5) {
			b.WriteString(g.suspect())
			b.WriteString(strings.Repeat("\n", g.IntN(4)/2+g.IntN(2)))
		}
		return b.String()
	case 5:
		return strings.Repeat("a-Z_0 "[:1+g.IntN(6)], g.IntN(2000))
	default:
		runes := make([]rune, g.IntN(12))
		for i := range runes {
			runes[i] = g.char()
		}
		return string(runes)
	}
}

// char makes a character, mostly of those that have caused trouble.
func (g *generator) char() rune {
	switch g.IntN(4) {
	case 0:
		return rune(1 + g.IntN(0x7f))
	case 1:
		return rune(0x80 + g.IntN(0x80))
	case 2:
		odd := []rune("\u2028\u2029\ufeff\ufffd\ufffe\uffff\u200b\u00a0\U0001f600\U0001fffe\U0010ffff\ud7ff\ue000")
		return odd[g.IntN(len(odd))]
	default:
		if c := rune(1 + g.IntN(0x10ffff)); c < 0xd800 || c > 0xdfff {
			return c
		}
		return '�'
	}
}

// suspect makes a text that some reader takes for something else, or a harmless
// one that ought to stay plain.
func (g *generator) suspect() string {
	switch n := g.IntN(len(suspects) + 6); n {
	case 0:
		return fmt.Sprint(g.IntN(100000))
	case 1:
		return fmt.Sprintf("%d:%d:%d", g.IntN(60), g.IntN(60), g.IntN(60))
	case 2:
		return fmt.Sprintf("%d.%de%d", g.IntN(9), g.IntN(99), g.IntN(99))
	case 3:
		return fmt.Sprintf("%d%s", g.IntN(512), []string{"m", "Mi", "MiB", "Gi", "k", "e", "E3", "_0"}[g.IntN(8)])
	case 4:
		return strings.Repeat(" ", g.IntN(4)) + "indented"
	case 5:
		return "trailing" + strings.Repeat(" ", g.IntN(3))
	default:
		return suspects[n-6]
	}
}

var suspects = strings.Split("|~|null|Null|NULL|nuLL|true|True|TRUE|false|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF|y|Y|n|N|"+
	"0|-0|+1|017|0o17|0x1F|0b11|1_000|1e3|1E-3|.5|-.5|5.|.inf|-.Inf|.NAN|nan|inf|infinity|1.2.3|0.1.0|2001-01-01|2001-01-01T00:00:00Z|12:30|"+
	"-|- a|--|---|...|?|? a|:|: a|a:|a: b|a:b|a ::b|#|a #b|a#b|,|[|]|{|}|{}|[]|&|&a|*|*a|!|!!str|!a|>|>-|%|%TAG|@|@a|`|'|''|'a'|\"|\"\"|\"a\"|"+
	"\\|\\n|\\u0041|a\\|<<|=|a=b|$(A)|${a}|/|/a/b|a/b.c|https://example.com:8080/a?b=c#d|-a|--flag=x|a, b|\t|a\tb|\r|\r\n|a\rb| |  |a b|é|日本|"+
	"\u0085|\u2028|\ufeffa|\x7f|\x1b[0m|\x01|anthropic-oauth-proxy|app.kubernetes.io/name|ghcr.io/a/b:v1.2.3|a@sha256:0123|0.0.0.0:8080|[::]:8080", "|")
