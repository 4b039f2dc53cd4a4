package oracles

import (
	"io/fs"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"

	tomltest "github.com/toml-lang/toml-test/v2"
)

// TestTOML holds the parser against toml-test's cases for TOML 1.0: it must reject every invalid document, and decode every valid
// one exactly or, if it is beyond the parser's subset, call it unsupported.
func TestTOML(t *testing.T) {
	cases := tomlCases(t)
	parser := startServed(t)
	invalid, decoded, unsupported := 0, 0, 0
	for _, c := range cases {
		var answer tomlAnswer
		parser.ask(t, map[string][]byte{"toml": c.doc}, &answer)
		switch {
		case strings.HasPrefix(c.name, "invalid/"):
			invalid++
			if len(answer.Errors) == 0 {
				t.Errorf("%s: accepted %q", c.name, c.doc)
			}
		case len(answer.Errors) > 0:
			unsupported++
			if !answer.unsupported() || !beyondSubset(c.doc, c.want) {
				t.Errorf("%s: refused %q:\n%s", c.name, c.doc, strings.Join(answer.Errors, "\n"))
			}
		default:
			decoded++
			compared := tomltest.Test{Path: c.name}.CompareJSON(c.want, answer.Document)
			if compared.Failed() {
				t.Errorf("%s: misread %q:\n%s", c.name, c.doc, compared.Failure)
			}
		}
	}
	t.Logf("%d invalid documents rejected, %d valid ones decoded, %d unsupported", invalid, decoded, unsupported)
	// Version 2.2.0 of toml-test has 474 and 205.
	if invalid < 450 || decoded+unsupported < 200 {
		t.Errorf("toml-test gave only %d invalid and %d valid documents", invalid, decoded+unsupported)
	}
}

// notation matches what the values of a document do not show: strings over several lines, arrays, inline tables, other bases and
// very long keys. It may match in a string or a comment too.
var notation = regexp.MustCompile(`"""|'''|=[ \t]*([\[{]|0[xob])|([^.\n]*\.){100}`)

// beyondSubset reports whether a valid document has something that the parser
// may call unsupported. v is what it says, as toml-test's tagged JSON.
func beyondSubset(doc []byte, v any) bool {
	if notation.Match(doc) {
		return true
	}
	switch v := v.(type) {
	case map[string]any:
		kind, tagged := v["type"].(string)
		_, scalar := v["value"].(string)
		if len(v) == 2 && tagged && scalar {
			return !slices.Contains([]string{"string", "integer", "bool"}, kind)
		}
		return slices.ContainsFunc(slices.Collect(maps.Values(v)), func(v any) bool { return beyondSubset(nil, v) })
	case []any: // of tables
		return slices.ContainsFunc(v, func(v any) bool { return beyondSubset(nil, v) })
	}
	return false
}

// tomlCase is a case of toml-test.
type tomlCase struct {
	name string // such as valid/array/array
	doc  []byte
	want any // tagged JSON; nil for an invalid document
}

// tomlCases returns toml-test's decoder cases for TOML 1.0.
func tomlCases(t testing.TB) []tomlCase {
	t.Helper()
	runner := tomltest.NewRunner(tomltest.Runner{Version: "1.0.0"})
	var cases []tomlCase
	for _, name := range proxytest.Must(runner.List())(t) {
		if strings.HasPrefix(name, "encoder/") {
			continue
		}
		c := tomlCase{name: name, doc: proxytest.Must(fs.ReadFile(runner.Files, name+".toml"))(t)}
		if strings.HasPrefix(name, "valid/") {
			test := tomltest.Test{Path: name}
			c.want = proxytest.Must(test.ReadWantJSON(runner.Files))(t)
		}
		cases = append(cases, c)
	}
	return cases
}

// tomlAnswer is what the parser says of one document.
type tomlAnswer struct {
	Errors   []string // "LINE:COL: message"
	Document any      // tagged JSON, if there are no errors
}

// unsupported reports whether the document was refused for what the parser leaves out. Errors below the first may follow from it.
func (a tomlAnswer) unsupported() bool {
	return len(a.Errors) > 0 && strings.Contains(a.Errors[0], ": unsupported: ")
}
