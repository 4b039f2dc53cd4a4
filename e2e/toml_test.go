package e2e

import (
	"io/fs"
	"slices"
	"strings"
	"testing"

	tomltest "github.com/toml-lang/toml-test/v2"
)

// unsupportedTOML lists toml-test's valid documents that the parser refuses:
// those with dates or times in them, and nothing else.
var unsupportedTOML = []string{
	"valid/array/array",
	"valid/comment/everywhere",
	"valid/datetime/datetime",
	"valid/datetime/edge",
	"valid/datetime/leap-year",
	"valid/datetime/local",
	"valid/datetime/local-date",
	"valid/datetime/local-time",
	"valid/datetime/milliseconds",
	"valid/datetime/timezone",
	"valid/example",
	"valid/spec-1.0.0/local-date-0",
	"valid/spec-1.0.0/local-date-time-0",
	"valid/spec-1.0.0/local-time-0",
	"valid/spec-1.0.0/offset-date-time-0",
	"valid/spec-1.0.0/offset-date-time-1",
	"valid/spec-1.0.0/table-7",
	"valid/spec-example-1",
	"valid/spec-example-1-compact",
}

// TestTOML holds the parser against toml-test's cases for TOML 1.0: it must
// reject every invalid document, and decode every valid one exactly or, if it
// is listed above, call it unsupported.
func TestTOML(t *testing.T) {
	cases := tomlCases(t)
	parser := startServed(t)
	valid, invalid := 0, 0
	var refused []string
	for _, c := range cases {
		answer := decodeTOML(t, parser, c.doc)
		switch {
		case strings.HasPrefix(c.name, "invalid/"):
			invalid++
			if len(answer.Errors) == 0 {
				t.Errorf("%s: accepted %q", c.name, c.doc)
			}
		case answer.unsupported():
			refused = append(refused, c.name)
			if !strings.Contains(strings.Join(answer.Errors, "\n"), "dates and times") {
				t.Errorf("%s: refused %q for no date or time:\n%s", c.name, c.doc, strings.Join(answer.Errors, "\n"))
			}
		case len(answer.Errors) > 0:
			t.Errorf("%s: refused %q:\n%s", c.name, c.doc, strings.Join(answer.Errors, "\n"))
		default:
			valid++
			compared := tomltest.Test{Path: c.name}.CompareJSON(c.want, answer.Document)
			if compared.Failed() {
				t.Errorf("%s: misread %q:\n%s", c.name, c.doc, compared.Failure)
			}
		}
	}
	t.Logf("%d invalid documents rejected, %d valid ones decoded, %d unsupported", invalid, valid, len(refused))
	if slices.Sort(refused); !slices.Equal(refused, unsupportedTOML) {
		t.Errorf("unsupported are\n%s\nwant\n%s", strings.Join(refused, "\n"), strings.Join(unsupportedTOML, "\n"))
	}
	// Version 2.2.0 of toml-test has 474 and 205.
	if invalid < 450 || valid+len(refused) < 200 {
		t.Errorf("toml-test gave only %d invalid and %d valid documents", invalid, valid+len(refused))
	}
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
	names, err := runner.List()
	if err != nil {
		t.Fatalf("listing toml-test's cases: %v", err)
	}
	var cases []tomlCase
	for _, name := range names {
		if strings.HasPrefix(name, "encoder/") {
			continue
		}
		c := tomlCase{name: name}
		if c.doc, err = fs.ReadFile(runner.Files, name+".toml"); err != nil {
			t.Fatalf("reading a case of toml-test: %v", err)
		}
		if strings.HasPrefix(name, "valid/") {
			test := tomltest.Test{Path: name}
			if c.want, err = test.ReadWantJSON(runner.Files); err != nil {
				t.Fatalf("reading what toml-test wants for %s: %v", name, err)
			}
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

// unsupported reports whether the document was refused, and only for what the
// parser leaves out.
func (a tomlAnswer) unsupported() bool {
	return len(a.Errors) > 0 && !slices.ContainsFunc(a.Errors, func(err string) bool {
		return !strings.Contains(err, "unsupported")
	})
}

// decodeTOML asks for one document. It is fatal to the test if the parser
// crashes.
func decodeTOML(t testing.TB, parser *served, doc []byte) (answer tomlAnswer) {
	t.Helper()
	if err := parser.ask(map[string][]byte{"toml": doc}, &answer); err != nil {
		t.Fatalf("decoding %.1000q: %v", doc, err)
	}
	return answer
}
