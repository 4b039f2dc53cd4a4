package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// tomlTagged converts a decoded value to toml-test's JSON, in which a scalar
// is an object that names its type.
func tomlTagged(v any) any {
	scalar := func(kind, text string) any {
		return map[string]string{"type": kind, "value": text}
	}
	switch v := v.(type) {
	case *tomlTable:
		table := make(map[string]any, len(v.entries))
		for _, e := range v.entries {
			table[e.key] = tomlTagged(e.value.v)
		}
		return table
	case []*tomlValue:
		array := make([]any, len(v))
		for i, element := range v {
			array[i] = tomlTagged(element.v)
		}
		return array
	case string:
		return scalar("string", v)
	case int64:
		return scalar("integer", strconv.FormatInt(v, 10))
	case float64:
		return scalar("float", strconv.FormatFloat(v, 'g', -1, 64))
	case bool:
		return scalar("bool", strconv.FormatBool(v))
	default:
		panic(fmt.Sprintf("parseTOML returned a %T", v))
	}
}

func tomlMessages(errs []tomlError) []string {
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	return texts
}

// tomlJSON writes a table as JSON, with the keys in order, for comparison.
func tomlJSON(t *testing.T, table *tomlTable) string {
	t.Helper()
	text, err := json.Marshal(tomlTagged(table))
	if err != nil {
		t.Fatalf("encoding a decoded document: %v", err)
	}
	return string(text)
}

// tomlText writes a value as TOML on one line.
func tomlText(v any) string {
	switch v := v.(type) {
	case *tomlTable:
		var pairs []string
		for _, e := range v.entries {
			pairs = append(pairs, quoteTOML(e.key)+" = "+tomlText(e.value.v))
		}
		return "{" + strings.Join(pairs, ", ") + "}"
	case []*tomlValue:
		var elements []string
		for _, element := range v {
			elements = append(elements, tomlText(element.v))
		}
		return "[" + strings.Join(elements, ", ") + "]"
	case string:
		return quoteTOML(v)
	case float64:
		if math.IsInf(v, 0) || math.IsNaN(v) {
			return strings.ToLower(fmt.Sprint(v))
		}
		return strconv.FormatFloat(v, 'e', -1, 64)
	default:
		return fmt.Sprint(v)
	}
}

// TestParseTOML decodes one value or construct per row; toml-test in e2e covers
// the language as a whole.
func TestParseTOML(t *testing.T) {
	for _, row := range []struct {
		name string
		doc  string
		want string // the same document in its plainest form, as TOML on one line
	}{
		{name: "nothing", doc: "", want: `{}`},
		{name: "only space", doc: " \t", want: `{}`},
		{name: "comments", doc: "# one\na = 1 # two\n  # three", want: `{"a" = 1}`},
		{name: "CRLF", doc: "a = 1\r\n\r\n[t] # x\r\nb = [\r\n2,\r\n]\r\n", want: `{"a" = 1, "t" = {"b" = [2]}}`},
		{name: "byte order mark", doc: "\ufeffa = 1", want: `{"a" = 1}`},
		{name: "file order", doc: "b = 1\na = 2\nc = 3", want: `{"b" = 1, "a" = 2, "c" = 3}`},
		{name: "keys", doc: "bare_-1 = 1\n\"quo\\u0074ed\" = 2\n'lit\\eral' = 3\n\"\" = 4", want: `{"bare_-1" = 1, "quoted" = 2, "lit\\eral" = 3, "" = 4}`},
		{name: "dotted keys", doc: "a.b = 1\na . \"c.d\" = 2\n3.14 = 3", want: `{"a" = {"b" = 1, "c.d" = 2}, "3" = {"14" = 3}}`},
		{name: "tables", doc: "[a]\nx = 1\n[ a . b ]\ny = 2\n[c.d]\n[c]\nz = 3", want: `{"a" = {"x" = 1, "b" = {"y" = 2}}, "c" = {"d" = {}, "z" = 3}}`},
		{name: "arrays of tables", doc: "[[a]]\nx = 1\n[a.b]\n[[a.c]]\n[[a]]\nx = 2\n[a.b]", want: `{"a" = [{"x" = 1, "b" = {}, "c" = [{}]}, {"x" = 2, "b" = {}}]}`},
		{name: "header below dotted keys", doc: "a.b.c = 1\n[a.b.d]\n[a.e]", want: `{"a" = {"b" = {"c" = 1, "d" = {}}, "e" = {}}}`},
		{name: "dotted key into an implicit table", doc: "[a.b.c]\n[a]\nb.d = 1", want: `{"a" = {"b" = {"c" = {}, "d" = 1}}}`},
		{name: "integers", doc: "a = [0, -0, +7, 1_000, 0xdead_BEEF, 0o7_7, 0b1_01, 0x00]", want: `{"a" = [0, 0, 7, 1000, 3735928559, 63, 5, 0]}`},
		{name: "extreme integers", doc: "a = [9223372036854775807, -9223372036854775808, 0x7fffffffffffffff]", want: `{"a" = [9223372036854775807, -9223372036854775808, 9223372036854775807]}`},
		{name: "floats", doc: "a = [1.5, -0.0, 1e3, 1_0.0_1E-0_2, 5e-324, 1e-999]", want: `{"a" = [1.5e+00, -0e+00, 1e+03, 1.001e-01, 5e-324, 0e+00]}`},
		{name: "special floats", doc: "a = [inf, +inf, -inf, nan, +nan, -nan]", want: `{"a" = [+inf, +inf, -inf, nan, nan, nan]}`},
		{name: "booleans", doc: "a = true\nb = false", want: `{"a" = true, "b" = false}`},
		{name: "basic string", doc: `a = "é # \b\t\n\f\r\"\\\u00E9\U0001F600 '"`, want: `{"a" = "é # \u0008\u0009\u000A\u000C\u000D\"\\é😀 '"}`},
		{name: "literal string", doc: `a = 'C:\new "x"'`, want: `{"a" = "C:\\new \"x\""}`},
		{name: "multi-line basic string", doc: "a = \"\"\"\n1 \\\n \n\t 2\\   \r\n3\n\\\"\"\" \"\"\"", want: `{"a" = "1 23\u000A\"\"\" "}`},
		{name: "multi-line literal string", doc: "a = '''\r\n\\1\n''2'''", want: `{"a" = "\\1\u000A''2"}`},
		{name: "quotation marks at the end", doc: `a = [""""1""""", '''''''', """"""]`, want: `{"a" = ["\"1\"\"", "''", ""]}`},
		{name: "arrays", doc: "a = [ # 1\n  [], [1, 'x'], # 2\n\n\t{b = [true]} # 3\n , ]", want: `{"a" = [[], [1, "x"], {"b" = [true]}]}`},
		{name: "inline tables", doc: "a = {}\nb = { c = 1, d.e = [\n2], d.f = \"\"\"\n3\"\"\" }", want: `{"a" = {}, "b" = {"c" = 1, "d" = {"e" = [2], "f" = "3"}}}`},
		{name: "as deep as may be", doc: "a = " + strings.Repeat("[", 100) + strings.Repeat("]", 100), want: `{"a" = ` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`},
	} {
		t.Run(row.name, func(t *testing.T) {
			table, errs := parseTOML([]byte(row.doc))
			if len(errs) > 0 {
				t.Fatalf("refused %q:\n%s", row.doc, strings.Join(tomlMessages(errs), "\n"))
			}
			if got := tomlText(table); got != row.want {
				t.Errorf("decoded %q\n got %s\nwant %s", row.doc, got, row.want)
			}
		})
	}
}

// TestParseTOMLErrors wants exactly these errors, whole. Most rows end with a
// second mistake, which must be found, and none may be reported twice.
func TestParseTOMLErrors(t *testing.T) {
	const (
		noValue     = "found the end of the line, expected a value"
		badEscape   = `this escape is unknown: write \\ for a backslash, or one of \b \t \n \f \r \" \uXXXX \UXXXXXXXX with the number of a character`
		notNumber   = ` is not a number: write digits on both sides of a point or underscore, and no leading zeros; put text in "quotes"`
		notValue    = ` is not a value: put text in "quotes", and write true, false, inf and nan in lower case`
		notKey      = ", expected a key (A-Z a-z 0-9 _ -, or any text in quotes)"
		inlineEnd   = "an inline table must end on its line: add }, or write it as a table with a header"
		arrayEnd    = "this array has no end: add ] after its last value"
		extended    = ": it cannot be extended here"
		redefined   = ": rename one of the two, or merge them"
		duplicate   = ": remove one of the two"
		tooDeep     = "unsupported: more than 100 levels of tables and arrays in one another"
		tooManyKeys = "unsupported: a key of more than 100 parts"
	)
	for _, row := range []struct {
		name string
		doc  string
		want []string
	}{
		{name: "no value", doc: "a =\nb = # x\n", want: []string{"1:4: " + noValue, "2:5: found '#', expected a value"}},
		{name: "no equals sign", doc: "a\nb : 1\nc", want: []string{
			"1:2: found the end of the line, expected = after the key",
			"2:3: found ':', expected = after the key",
			"3:2: found the end of the line, expected = after the key"}},
		{name: "no key", doc: "= 1\né = 2\n. = 3\na. = 4\n", want: []string{
			"1:1: found '='" + notKey, "2:1: found 'é'" + notKey, "3:1: found '.'" + notKey, "4:4: found '='" + notKey}},
		{name: "columns count characters", doc: "'é😀' = é\n\t\t= 2", want: []string{"1:8: é" + notValue, "2:3: found '='" + notKey}},
		{name: "columns behind a byte order mark", doc: "\ufeff=", want: []string{"1:1: found '='" + notKey}},
		{name: "two values", doc: "a = 1 2\nb = 1 c = 2\nb = 2", want: []string{
			"1:7: found '2', expected the end of the line",
			"2:7: found 'c', expected the end of the line",
			`3:1: "b" is already a value (line 2)` + duplicate}},
		{name: "bare words", doc: "a = yes\nb = True\nc = “x”\nd = \u00a01", want: []string{
			"1:5: yes" + notValue, "2:5: True" + notValue, "3:5: “x”" + notValue, `4:5: \u00a01` + notValue}},
		{name: "numbers", doc: "a = 01\nb = 1__0\nc = .5\nd = 5.\ne = 0xg\nf = +0x1\ng = 1e\n", want: []string{
			"1:5: 01" + notNumber, "2:5: 1__0" + notNumber, "3:5: .5" + notNumber, "4:5: 5." + notNumber,
			"5:5: 0xg" + notNumber, "6:5: +0x1" + notNumber, "7:5: 1e" + notNumber}},
		{name: "numbers out of range", doc: "a = 9223372036854775808\nb = 0xffffffffffffffff\nc = -1e400", want: []string{
			"1:5: 9223372036854775808 is too large: an integer has 64 bits, one for the sign",
			"2:5: 0xffffffffffffffff is too large: an integer has 64 bits, one for the sign",
			"3:5: unsupported: -1e400 is too large for 64 bits"}},
		{name: "long words", doc: "a = " + strings.Repeat("é", 1000), want: []string{"1:5: " + strings.Repeat("é", 40) + "…" + notValue}},
		{name: "dates and times", doc: "a = 1979-05-27T07:32:00Z\nb = [\n1979-05-27 07:32:00,\n07:32:00]\nc = 1979-02-30\n", want: []string{
			`1:5: unsupported: dates and times; write "1979-05-27T07:32:00Z"`,
			`3:1: unsupported: dates and times; write "1979-05-27"`,
			`5:5: unsupported: dates and times; write "1979-02-30"`}},
		{name: "escapes", doc: `a = "C:\path\n\x41"` + "\n" + `b = ["\uD800", "\U00110000", "\u12"]` + "\nc = \"\"\"\n\\ x\n\"\"\"\nd =", want: []string{
			"1:8: " + badEscape, "1:15: " + badEscape, "2:7: " + badEscape, "2:17: " + badEscape, "2:31: " + badEscape, "4:1: " + badEscape, "6:4: " + noValue}},
		{name: "string without end", doc: "a = \"x\nb = 'y\nc = \"C:\\\nd = \"\\\"\ne =", want: []string{
			`1:5: this string has no end: add " after it`, "2:5: this string has no end: add ' after it",
			`3:5: this string has no end: add " after it`, `4:5: this string has no end: add " after it`, "5:4: " + noValue}},
		{name: "string without end in a file without end", doc: `a = "\`, want: []string{`1:5: this string has no end: add " after it`}},
		{name: "string without end, then other errors", doc: "a = \"x\nb =\nc d", want: []string{
			`1:5: this string has no end: add " after it`, "2:4: " + noValue, "3:3: found 'd', expected = after the key"}},
		{name: "multi-line string without end behind an error", doc: "a b = \"\"\"\nc =", want: []string{
			"1:3: found 'b', expected = after the key", "2:4: " + noValue}},
		{name: "string broken over lines", doc: "a = \"first\nsecond\n third\"\nb =", want: []string{
			`1:5: this string has no end: add " after it`, "4:4: " + noValue}},
		{name: "multi-line string without end", doc: "a =\nb = \"\"\"\n[x\nc =", want: []string{
			"1:4: " + noValue, `2:5: this string has no end: add """ after it`}},
		{name: "multi-line string as a key", doc: "\"\"\"a\"\"\" = 1\n['''a''']", want: []string{
			"1:1: a key cannot be a multi-line string: use one quotation mark", "2:2: a key cannot be a multi-line string: use one quotation mark"}},
		{name: "six quotation marks at the end", doc: "a = \"\"\"x\"\"\"\"\"\"\nb =", want: []string{
			`1:14: found '"', expected the end of the line`, "2:4: " + noValue}},
		{name: "array without end before a key", doc: "a = [\n  1,\n  2\nb = 3\nb = 4", want: []string{
			"1:5: " + arrayEnd, `5:1: "b" is already a value (line 4)` + duplicate}},
		{name: "array without end before a header", doc: "a = [1\n[b]\nc =", want: []string{
			"2:1: found '[', expected , or ] after a value of an array", "3:4: " + noValue}},
		{name: "array without end", doc: "a = [[1],\n# x", want: []string{"1:5: " + arrayEnd}},
		{name: "array without end, with lines like headers", doc: "a = [[oops],\n[b], [c]\n[d] # e\nf =", want: []string{
			"1:7: oops" + notValue, "4:4: " + noValue}},
		{name: "array without end, with an error below what may be a header", doc: "a = [\n[1]\n, oops\nb =", want: []string{
			"3:3: oops" + notValue, "4:4: " + noValue}},
		{name: "array without comma", doc: "a = [\n  1\n  2,\n]\nb =", want: []string{
			"3:3: found '2', expected , or ] after a value of an array", "5:4: " + noValue}},
		{name: "array with too many commas", doc: "a = [,]\nb = [1,,2]\n", want: []string{
			"1:6: found ',', expected a value", "2:8: found ',', expected a value"}},
		{name: "array with a wrong value", doc: "a = [\n  oops,\n  [1]\n]\nb =", want: []string{"2:3: oops" + notValue, "5:4: " + noValue}},
		{name: "wrong bracket", doc: "a = [1}\nb = {c = 1]\nd =", want: []string{
			"1:7: found '}', expected , or ] after a value of an array",
			"2:11: found ']', expected , or } after a value of an inline table", "3:4: " + noValue}},
		{name: "inline table on several lines", doc: "a = [\n  {\n    b = 1,\n    c = 2\n  },\n]\nd =", want: []string{"2:4: " + inlineEnd, "7:4: " + noValue}},
		{name: "inline table without end", doc: "a = { b = 1\nc = { # x\nd =", want: []string{"1:12: " + inlineEnd, "2:7: " + inlineEnd, "3:4: " + noValue}},
		{name: "inline table with a trailing comma", doc: "a = { b = 1, }\n", want: []string{"1:14: found '}'" + notKey}},
		{name: "rest of a broken statement on more lines", doc: "a b = [\n1,\n]\nc = = \"\"\"\nd\n\"\"\"\ne =", want: []string{
			"1:3: found 'b', expected = after the key", "4:5: found '=', expected a value", "7:4: " + noValue}},
		{name: "headers", doc: "[]\n[a\n[[b]\n[c] d\n[e]]\n[ [f]]\n[g.]\n", want: []string{
			"1:2: found ']'" + notKey, "2:3: found the end of the line, expected ] after the name of the table",
			"3:4: found ']', expected ]] after the name of the table", "4:5: found 'd', expected the end of the line",
			"5:4: found ']', expected the end of the line", "6:3: found '['" + notKey, "7:4: found ']'" + notKey}},
		{name: "lines below a broken header are not the table above", doc: "[a]\nx = 1\n[b\nx = 1\nx = 2", want: []string{
			"3:3: found the end of the line, expected ] after the name of the table", `5:1: "x" is already a value (line 4)` + duplicate}},
		{name: "duplicate keys", doc: "a = 1\n\"a\" = 2\nb.c = 1\nb.c = 2\nb = 3\nd = {e = 1, e = 2}", want: []string{
			`2:1: "a" is already a value (line 1)` + duplicate, `4:3: "c" is already a value (line 3)` + duplicate,
			`5:1: "b" is already a table made by dotted keys (line 3)` + duplicate, `6:13: "e" is already a value (line 6)` + duplicate}},
		{name: "duplicate tables", doc: "[a]\nx = 1\n[a]\nx = 1\n[a.b]\n[[a]]\n[[c]]\n[c]\n[d.e]\n[d]\n[d]\n", want: []string{
			`3:2: "a" is already a table with a header (line 1)` + redefined, `6:3: "a" is already a table with a header (line 1)` + redefined,
			`8:2: "c" is already an array of tables (line 7)` + redefined, `11:2: "d" is already a table with a header (line 9)` + redefined}},
		{name: "tables made by dotted keys", doc: "a.b.c = 1\n[a]\n[a.b]\n[[a.b]]\n[a.d]\n", want: []string{
			`2:2: "a" is already a table made by dotted keys (line 1)` + redefined, `3:4: "b" is already a table made by dotted keys (line 1)` + redefined,
			`4:5: "b" is already a table made by dotted keys (line 1)` + redefined}},
		{name: "implicit table defined by a dotted key", doc: "[a.b.c]\n[a]\nb.d = 1\n[a.b]\n", want: []string{
			`4:4: "b" is already a table made by dotted keys (line 1)` + redefined}},
		{name: "dotted keys into tables with headers", doc: "[a.b]\n[[a.c]]\n[a]\nb.x = 1\nc.x = 1\n", want: []string{
			`4:1: "b" is already a table with a header (line 1)` + extended, `5:1: "c" is already an array of tables (line 2)` + extended}},
		{name: "inline tables are closed", doc: "a = {b.c = 1}\na.d = 1\na.b.d = 1\n[a.e]\n[a]\n[[a]]\n", want: []string{
			`2:1: "a" is already an inline table (line 1)` + extended, `3:1: "a" is already an inline table (line 1)` + extended,
			`4:2: "a" is already an inline table (line 1)` + extended, `5:2: "a" is already an inline table (line 1)` + redefined,
			`6:3: "a" is already an inline table (line 1)` + redefined}},
		{name: "arrays are closed", doc: "a = []\nb = [{}]\n[[a]]\n[[b]]\n[b.c]\n", want: []string{
			`3:3: "a" is already an array (line 1)` + redefined, `4:3: "b" is already an array (line 2)` + redefined, `5:2: "b" is already an array (line 2)` + extended}},
		{name: "values are no tables", doc: "a = 1\na.b = 2\n[a.c]\n", want: []string{
			`2:1: "a" is already a value (line 1)` + extended, `3:2: "a" is already a value (line 1)` + extended}},
		{name: "implicit table as an array", doc: "[[a.b]]\n[[a]]\n", want: []string{`2:3: "a" is already a table (line 1)` + redefined}},
		{name: "not UTF-8", doc: "# \xff\xfe\na = \"\xc3\"\nb = \xed\xa0\x80\nc =", want: []string{
			"1:3: byte 0xFF is not UTF-8: save the file in that encoding", "2:6: byte 0xC3 is not UTF-8: save the file in that encoding",
			"3:5: byte 0xED is not UTF-8: save the file in that encoding", "4:4: " + noValue}},
		{name: "control characters", doc: "a = \"\x00\"\n# \x7f\nb = '''\n\x1f\r'''\n\x0b\nc =", want: []string{
			`1:6: control character U+0000: remove it, or write \u0000 in a string with double quotes`,
			`2:3: control character U+007F: remove it, or write \u007F in a string with double quotes`,
			`4:1: control character U+001F: remove it, or write \u001F in a string with double quotes`,
			`5:1: control character U+000B: remove it, or write \u000B in a string with double quotes`, "6:4: " + noValue}},
		{name: "carriage returns", doc: "a = 1\r\n# \r\r\nb = \"\"\"\r\"\"\"\n\r", want: []string{
			"2:3: carriage return without line feed: end lines with LF or CRLF", "3:8: carriage return without line feed: end lines with LF or CRLF",
			"4:1: carriage return without line feed: end lines with LF or CRLF"}},
		{name: "byte order mark elsewhere", doc: "\ufeff\ufeffa = 1", want: []string{`1:1: found '\ufeff'` + notKey}},
		{name: "too deep", doc: "a.b = " + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "\nc =", want: []string{"1:106: " + tooDeep, "2:4: " + noValue}},
		{name: "too deep, never closed", doc: "a = " + strings.Repeat("[{a=", 100_000), want: []string{"1:205: " + tooDeep}},
		{name: "header too deep", doc: "[" + strings.Repeat("a.", 100) + "a]\nb =", want: []string{"1:202: " + tooManyKeys, "2:4: " + noValue}},
	} {
		t.Run(row.name, func(t *testing.T) {
			_, errs := parseTOML([]byte(row.doc))
			if got := tomlMessages(errs); !slices.Equal(got, row.want) {
				t.Errorf("errors of %.200q\n got %s\nwant %s", row.doc, strings.Join(got, "\n     "), strings.Join(row.want, "\n     "))
			}
		})
	}
}

func TestParseTOMLGivesUp(t *testing.T) {
	_, errs := parseTOML(bytes.Repeat([]byte("not TOML\n"), 1000))
	if len(errs) != maxTOMLErrors || errs[len(errs)-1].Error() != "100:5: too many errors: is this a TOML file?" {
		t.Errorf("got %d errors, the last %q", len(errs), errs[len(errs)-1])
	}
}

// TestParseTOMLPositions holds the places that the checks of the configuration
// report.
func TestParseTOMLPositions(t *testing.T) {
	table, errs := parseTOML([]byte("'é' = 1\n[proxy]\n  'a'.b =  'x'\n\n  [[headers]]\nlist = [ 1,\n {c = 2} ]\n"))
	if len(errs) > 0 {
		t.Fatalf("refused: %v", errs)
	}
	var got []string
	var walk func(path string, v *tomlValue)
	walk = func(path string, v *tomlValue) {
		switch x := v.v.(type) {
		case *tomlTable:
			got = append(got, fmt.Sprintf("%s: table %v", path, x.pos))
			for _, e := range x.entries {
				got = append(got, fmt.Sprintf("%s.%s: key %v, value %v", path, e.key, e.pos, e.value.pos))
				walk(path+"."+e.key, e.value)
			}
		case []*tomlValue:
			for i, element := range x {
				got = append(got, fmt.Sprintf("%s[%d]: value %v", path, i, element.pos))
				walk(fmt.Sprintf("%s[%d]", path, i), element)
			}
		}
	}
	walk("", &tomlValue{v: table})
	want := []string{
		": table {1 1}",
		".é: key {1 1}, value {1 7}",
		".proxy: key {2 2}, value {2 2}",
		".proxy: table {2 2}",
		".proxy.a: key {3 3}, value {3 3}",
		".proxy.a: table {3 3}",
		".proxy.a.b: key {3 7}, value {3 12}",
		".headers: key {5 5}, value {5 5}",
		".headers[0]: value {5 5}",
		".headers[0]: table {5 5}",
		".headers[0].list: key {6 1}, value {6 8}",
		".headers[0].list[0]: value {6 10}",
		".headers[0].list[1]: value {7 2}",
		".headers[0].list[1]: table {7 2}",
		".headers[0].list[1].c: key {7 3}, value {7 7}",
	}
	if !slices.Equal(got, want) {
		t.Errorf("positions\n got %s\nwant %s", strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

// TestParseTOMLIncomplete reads what is left of a document with errors.
func TestParseTOMLIncomplete(t *testing.T) {
	table, errs := parseTOML([]byte("[a]\nx = 1\ny = oops\n[b]\nx = 2\nx = 3\n[c]\nx = \"\\q\"\n[d"))
	if len(errs) != 4 {
		t.Fatalf("got %d errors, want 4:\n%s", len(errs), strings.Join(tomlMessages(errs), "\n"))
	}
	if got, want := tomlText(table), `{"a" = {"x" = 1}, "b" = {"x" = 2}, "c" = {}}`; got != want {
		t.Errorf("decoded\n got %s\nwant %s", got, want)
	}
	for name, want := range map[string]bool{"a": true, "b": false, "c": true} {
		if got := table.get(name).v.(*tomlTable).incomplete; got != want {
			t.Errorf("[%s] incomplete: got %v, want %v", name, got, want)
		}
	}
	if got := table.get("d"); got != nil {
		t.Errorf("[d, a broken header, made %v", got)
	}
}

// TestParseTOMLHostile would run for minutes if anything took more than linear
// time, and would crash if anything recursed without bound.
func TestParseTOMLHostile(t *testing.T) {
	const size, limit = 256 << 10, 20 * time.Second
	keys := func(n int) string {
		var doc strings.Builder
		for i := range n {
			fmt.Fprintf(&doc, "key%d = %d\n", i, i)
		}
		return doc.String()
	}
	for _, row := range []struct {
		name                 string
		prefix, unit, suffix string
		valid                bool
	}{
		{name: "100,000 keys", prefix: keys(100_000), valid: true},
		{name: "array of tables", unit: "[[a]]\n", valid: true},
		{name: "tables in the last of an array", prefix: "[[a]]\n", unit: "[[a.b]]\n", valid: true},
		{name: "long array", prefix: "a = [", unit: "1,", suffix: "]", valid: true},
		{name: "array of many lines", prefix: "a = [\n", unit: "'a', # x\n", suffix: "]", valid: true},
		{name: "long string", prefix: "a = '", unit: "é", suffix: "'", valid: true},
		{name: "many escapes", prefix: `a = "`, unit: `\t`, suffix: `"`, valid: true},
		{name: "many line ends", prefix: `a = """`, unit: "\\\n", suffix: `"""`, valid: true},
		{name: "blank lines", unit: "\n", valid: true},
		{name: "long float", prefix: "a = 1.0", unit: "_1", valid: true},
		{name: "long key", prefix: "a", unit: "b", suffix: " = 1", valid: true},
		{name: "dotted header", prefix: "[", unit: "a."},
		{name: "dotted key", unit: "a . "},
		{name: "deep arrays", prefix: "a = ", unit: "["},
		{name: "deep inline tables", prefix: "a = ", unit: "{a="},
		{name: "brackets after an error", prefix: "a = 1 ", unit: "["},
		{name: "arrays without end", unit: "a = [\n"},
		{name: "arrays of tables without end", unit: "a = [{\n"},
		{name: "array of what may be headers", prefix: "a = [\n", unit: "[x\n"},
		{name: "array of dotted words", prefix: "a = [\n", unit: "a.a.a\n"},
		{name: "strings without end", unit: "a = \"\n"},
		{name: "multi-line strings without end", unit: "a = \"\"\"\n", suffix: "x"},
		{name: "quotation marks", unit: `"`},
		{name: "wrong escapes", prefix: `a = "`, unit: `\q`, suffix: `"`},
		{name: "backslashes before space", prefix: `a = """`, unit: `\ `, suffix: `"""`},
		{name: "duplicate keys", unit: "a=1\n"},
		{name: "duplicate headers", unit: "[a.b.c.d.e.f.g]\n"},
		{name: "long word", prefix: "a = ", unit: "0_"},
		{name: "control characters", unit: "\x01"},
		{name: "lines of control characters", unit: "\x01\n"},
		{name: "carriage returns", unit: "\r"},
		{name: "not UTF-8", unit: "\xff\n"},
	} {
		t.Run(row.name, func(t *testing.T) {
			doc := row.prefix
			if row.unit != "" {
				doc += strings.Repeat(row.unit, size/len(row.unit)) + row.suffix
			}
			start := time.Now()
			_, errs := parseTOML([]byte(doc))
			took := time.Since(start)
			t.Logf("%d bytes in %v, %d errors", len(doc), took.Round(time.Millisecond), len(errs))
			if took > limit {
				t.Errorf("%d bytes took %v, over %v", len(doc), took, limit)
			}
			if row.valid != (len(errs) == 0) {
				t.Errorf("got %d errors, want valid %v: %.200q", len(errs), row.valid, tomlMessages(errs))
			}
		})
	}
}

func TestQuoteTOML(t *testing.T) {
	for _, row := range []struct {
		name, text, want string
	}{
		{name: "empty", text: "", want: `""`},
		{name: "plain", text: "anthropic-beta é😀 # 'x'", want: `"anthropic-beta é😀 # 'x'"`},
		{name: "quotes and backslashes", text: `"C:\n"`, want: `"\"C:\\n\""`},
		{name: "control characters", text: "\x00\t\n\r\x1f\x7f", want: `"\u0000\u0009\u000A\u000D\u001F\u007F"`},
		{name: "not UTF-8", text: "a\xff\xfeb", want: `"a` + "\ufffd\ufffd" + `b"`},
	} {
		t.Run(row.name, func(t *testing.T) {
			if got := quoteTOML(row.text); got != row.want {
				t.Errorf("quoteTOML(%q) = %s, want %s", row.text, got, row.want)
			}
		})
	}
}

// FuzzParseTOML feeds anything to the parser. Errors must lie in the document
// and be in order; what is accepted must survive being written and read again.
func FuzzParseTOML(f *testing.F) {
	for _, doc := range []string{
		"a.b = 1\n[c.d]\n'e f' = \"\"\"\n\\u00e9\\\n\"\"\"\n[[g]]\nh = [1.5, {i = -inf}, 0x_1]\n",
		"a = [\n1,\n# x\r\n", "[[a]\nb = {c = 1\n", "a = '''\n", "\ufeffa = 1 2\n\xff\n\x00", "a = 1979-05-27",
	} {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		table, errs := parseTOML(doc)
		last := position{1, 1}
		for _, err := range errs {
			if err.pos.line < last.line || err.pos.line == last.line && err.pos.col < last.col {
				t.Errorf("error %q comes after %v", err, last)
			}
			last = err.pos
		}
		if lines := bytes.Count(doc, []byte("\n")) + 1; last.line > lines {
			t.Errorf("an error is in line %d of %d", last.line, lines)
		}
		if len(errs) > 0 {
			return
		}
		written := "document = " + tomlText(table)
		again, errs := parseTOML([]byte(written))
		if len(errs) > 0 && strings.Contains(errs[0].msg, "levels") {
			return // headers lie less deep than the same tables written inline
		}
		if len(errs) > 0 {
			t.Fatalf("accepted %q, but not\n%s\n%v", doc, written, errs)
		}
		if got, want := tomlJSON(t, again.get("document").v.(*tomlTable)), tomlJSON(t, table); got != want {
			t.Errorf("read %q\nas    %s\nagain %s", doc, want, got)
		}
	})
}

// FuzzQuoteTOML reads back what quoteTOML writes.
func FuzzQuoteTOML(f *testing.F) {
	f.Add("\"\\\x00\u0085é\ufeff\U0010ffff\xff")
	f.Fuzz(func(t *testing.T, text string) {
		quoted := quoteTOML(text)
		table, errs := parseTOML([]byte(quoted + " = " + quoted))
		if len(errs) > 0 {
			t.Fatalf("quoteTOML(%q) = %s, which is refused: %v", text, quoted, errs)
		}
		want := string([]rune(text)) // each byte that is not UTF-8 is now U+FFFD
		if v := table.get(want); v == nil || v.v != want {
			t.Errorf("quoteTOML(%q) = %s, read as %s", text, quoted, tomlText(table))
		}
	})
}
