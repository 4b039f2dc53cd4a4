package oracles

import (
	"bytes"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"testing"

	burntsushi "github.com/BurntSushi/toml"
	pelletier "github.com/pelletier/go-toml/v2"
)

// compareTOML holds the parser against two others. It may accept only what at least one of them accepts, and must decode it as
// they do; it must accept what both accept, or call it unsupported if it is. Where those two differ, one is wrong or TOML 1.0 is
// silent:
//
//   - BurntSushi/toml reads TOML 1.1 (inline tables over several lines, \e, \x,
//     times without seconds), and lets headers define some tables again that
//     dotted keys made.
//   - go-toml refuses a byte order mark, and dotted keys into a table that only
//     the header of a sub-table implied.
func compareTOML(t *testing.T, parser *served, doc []byte) (accepted bool) {
	t.Helper()
	var answer tomlAnswer
	parser.ask(t, map[string][]byte{"toml": doc}, &answer)
	accepted = len(answer.Errors) == 0
	oracles := map[string]func([]byte, any) error{
		"BurntSushi/toml": burntsushi.Unmarshal,
		"go-toml":         pelletier.Unmarshal,
	}
	var refusals []string
	var read any // by one of them
	for name, unmarshal := range oracles {
		var want map[string]any
		if err := unmarshal(doc, &want); err != nil {
			refusals = append(refusals, fmt.Sprintf("%s: %v", name, err))
			continue
		}
		read = taggedTOML(want)
		if accepted && !reflect.DeepEqual(answer.Document, read) {
			t.Errorf("read %q\nas %v\n%s reads\n   %v", doc, answer.Document, name, read)
		}
	}
	switch {
	case accepted && len(refusals) == len(oracles):
		t.Errorf("accepted %q, but\n%s", doc, strings.Join(refusals, "\n"))
	case !accepted && len(refusals) == 0 && !(answer.unsupported() && beyondSubset(doc, read)) && !bytes.Contains(doc, []byte(`\e`)): // which is of TOML 1.1
		t.Errorf("refused %q, which all others accept:\n%s", doc, strings.Join(answer.Errors, "\n"))
	}
	return accepted
}

// FuzzTOMLDifferential compares the parsers on what grows out of toml-test's valid documents. The invalid ones are TestTOML's.
func FuzzTOMLDifferential(f *testing.F) {
	for _, c := range tomlCases(f) {
		if c.want != nil {
			f.Add(c.doc)
		}
	}
	parser := startServed(f)
	f.Fuzz(func(t *testing.T, doc []byte) { compareTOML(t, parser, doc) })
}

// TestTOMLTables compares the parsers on every document of four lines from the
// list below: they define the same few tables and keys in every way and order.
func TestTOMLTables(t *testing.T) {
	lines := []string{
		"[a]", "[a.b]", "[a.b.c]", "[b]", "[[a]]", "[[a.b]]", "[[a.b.c]]", "[[b]]",
		"a = 1", "a.b = 1", "a.b.c = 1", "b = 1", "b.c = 1", "b.c.d = 1",
	}
	parser := startServed(t)
	accepted, all := 0, 0
	for i := range len(lines) * len(lines) * len(lines) * len(lines) {
		var doc []byte
		for range 4 {
			doc = append(doc, lines[i%len(lines)]+"\n"...)
			i /= len(lines)
		}
		if compareTOML(t, parser, doc) {
			accepted++
		}
		all++
	}
	t.Logf("%d documents of %d are valid", accepted, all)
	if accepted < all/20 {
		t.Errorf("only %d documents of %d are valid: the lines hardly fit together", accepted, all)
	}
}

// taggedTOML converts what the oracles decode to toml-test's tagged JSON.
func taggedTOML(v any) any {
	scalar := func(kind, text string) any {
		return map[string]any{"type": kind, "value": text}
	}
	switch v := v.(type) {
	case map[string]any:
		table := map[string]any{}
		for key, value := range v {
			table[key] = taggedTOML(value)
		}
		return table
	case []any:
		array := []any{}
		for _, value := range v {
			array = append(array, taggedTOML(value))
		}
		return array
	case []map[string]any:
		array := []any{}
		for _, value := range v {
			array = append(array, taggedTOML(value))
		}
		return array
	case string:
		return scalar("string", v)
	case int64:
		return scalar("integer", strconv.FormatInt(v, 10))
	case bool:
		return scalar("bool", strconv.FormatBool(v))
	default: // floats, dates and times, which the parser accepts nowhere
		return scalar(fmt.Sprintf("%T", v), fmt.Sprint(v))
	}
}
