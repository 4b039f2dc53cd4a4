package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"
)

// tomlTree converts what parseTOML returns to maps, slices and what scalar makes of the others.
func tomlTree(v any, scalar func(any) any) any {
	switch v := v.(type) {
	case *tomlTable:
		table := map[string]any{}
		for key, e := range v.entries {
			table[key] = tomlTree(e.value, scalar)
		}
		return table
	case []*tomlTable:
		array := make([]any, len(v))
		for i, element := range v {
			array[i] = tomlTree(element, scalar)
		}
		return array
	default:
		return scalar(v)
	}
}

// tomlTagged makes a scalar one of toml-test's JSON, an object that names its type.
func tomlTagged(v any) any {
	kind := map[reflect.Kind]string{reflect.String: "string", reflect.Int64: "integer", reflect.Bool: "bool"}[reflect.TypeOf(v).Kind()]
	return map[string]any{"type": kind, "value": fmt.Sprint(v)}
}

func tomlMessages(errs []tomlError) []string {
	var texts []string
	for _, err := range errs {
		texts = append(texts, err.Error())
	}
	return texts
}

// TestParseTOML decodes one construct per row, to what JSON calls it; toml-test in e2e covers the language as a whole.
func TestParseTOML(t *testing.T) {
	for name, row := range map[string]struct{ doc, want string }{
		"only space":                        {" \t", `{}`},
		"comments":                          {"# é\na = 1 # two\n  # three\n[t]# four", `{"a":1,"t":{}}`},
		"CRLF":                              {"a = 1\r\n\r\n[t] # x\r\nb = 'c'\r\n", `{"a":1,"t":{"b":"c"}}`},
		"byte order mark":                   {"\ufeffa = 1", `{"a":1}`},
		"keys":                              {"bare_-1 = 1\n\"quo\\u0074ed\" = 2\n'lit\\eral' = 3\n\"\" = 4", `{"":4,"bare_-1":1,"lit\\eral":3,"quoted":2}`},
		"dotted keys":                       {"a.b = 1\na . \"c.d\" = 2\n3.14 = 3", `{"3":{"14":3},"a":{"b":1,"c.d":2}}`},
		"tables":                            {"[a]\nx = 1\n[ a . b ]\ny = 2\n[c.d]\n[c]\nz = 3", `{"a":{"b":{"y":2},"x":1},"c":{"d":{},"z":3}}`},
		"arrays of tables":                  {"[[a]]\nx = 1\n[a.b]\n[[a.c]]\n[[ a ]]\nx = 2\n[a.b]", `{"a":[{"b":{},"c":[{}],"x":1},{"b":{},"x":2}]}`},
		"header below dotted keys":          {"a.b.c = 1\n[a.b.d]\n[a.e]", `{"a":{"b":{"c":1,"d":{}},"e":{}}}`},
		"dotted key into an implicit table": {"[a.b.c]\n[a]\nb.d = 1", `{"a":{"b":{"c":{},"d":1}}}`},
		"integers": {"a = 0\nb = -0\nc = +7\nd = 1_0_00\ne = 9223372036854775807\nf = -9223372036854775808",
			`{"a":0,"b":0,"c":7,"d":1000,"e":9223372036854775807,"f":-9223372036854775808}`},
		"booleans":              {"a = true\nb = false#", `{"a":true,"b":false}`},
		"basic string":          {`a = "é # \b\t\n\f\r\"\\\u00E9\U0001F600 '"#`, `{"a":"é # \b\t\n\f\r\"\\é😀 '"}`},
		"literal string":        {`a = 'C:\new "x"'`, `{"a":"C:\\new \"x\""}`},
		"replacement character": {"a = '\ufffd'", `{"a":"�"}`},
	} {
		table, errs := parseTOML([]byte(row.doc))
		equal(t, name, string(must(json.Marshal(tomlTree(table, func(v any) any { return v })))), row.want)
		equal(t, name+": errors", errs, nil)
	}
}

// TestParseTOMLErrors wants exactly these errors, whole. Most rows end with a
// second mistake, which must be found, and none may be reported twice.
func TestParseTOMLErrors(t *testing.T) {
	const (
		noValue   = "found the end of the line, expected a value"
		noEquals  = ", expected = after the key"
		badEscape = `this escape is unknown: write \\ for a backslash, or one of \b \t \n \f \r \" \uXXXX \UXXXXXXXX with the number of a character`
		notKey    = ", expected a key (A-Z a-z 0-9 _ -, or any text in quotes)"
		lineEnd   = ", expected the end of the line"
		taken     = ", and cannot be extended here: rename one of the two, or merge them"
		duplicate = ": remove one of the two"
		multiline = `unsupported: multi-line strings; write "…" on one line, with \n where a line ends`
		arrays    = "unsupported: arrays; write a header [[name]] for each table of an array, and its keys below"
		inline    = "unsupported: inline tables; write a header [name], and the keys below"
	)
	unsupported := func(value string) string {
		return fmt.Sprintf("unsupported: `%s`; write %[1]q, or a whole number of at most 64 bits in decimal digits without leading zeros", value)
	}
	unknown := func(value string) string {
		return fmt.Sprintf("unknown value `%s`: write %[1]q for text, true or false in lower case, and one setting on a line", value)
	}
	control := func(c rune) string {
		return fmt.Sprintf(`control character U+%04X: remove it, or write \u%04[1]X in a string with double quotes (lines end with LF or CRLF)`, c)
	}
	for name, row := range map[string]struct {
		doc  string
		want []string
	}{
		"no value":                 {doc: "a =\nb = # x\n", want: []string{"1:4: " + noValue, `2:5: found "#", expected a value`}},
		"no equals sign":           {doc: "a\nb : 1\nc", want: []string{"1:2: found the end of the line" + noEquals, `2:3: found ":"` + noEquals, "3:2: found the end of the line" + noEquals}},
		"no key":                   {doc: "= 1\né = 2\n. = 3\na. = 4\n", want: []string{`1:1: found "="` + notKey, `2:1: found "é"` + notKey, `3:1: found "."` + notKey, `4:4: found "="` + notKey}},
		"columns count characters": {doc: "'é😀' = é\n\t\t= 2", want: []string{"1:8: " + unknown("é"), `2:3: found "="` + notKey}},
		"two values":               {doc: "a = '1' 2\nb = 1 c = 2\nb = 2", want: []string{`1:9: found "2"` + lineEnd, "2:5: " + unsupported("1 c = 2")}},
		"words":                    {doc: "a = yes\nb = True # x\nc = “x”\nd = my proxy ", want: []string{"1:5: " + unknown("yes"), "2:5: " + unknown("True"), "3:5: " + unknown("“x”"), "4:5: " + unknown("my proxy")}},
		"numbers that are wrong": {doc: "a = 01\nb = 1__0\nc = +_1\nd = 1_\ne = -00\nf = +-1\ng = 9223372036854775808", want: []string{
			"1:5: " + unsupported("01"), "2:5: " + unsupported("1__0"), "3:5: " + unsupported("+_1"), "4:5: " + unsupported("1_"),
			"5:5: " + unsupported("-00"), "6:5: " + unsupported("+-1"), "7:5: " + unsupported("9223372036854775808")}},
		"numbers beyond the subset": {doc: "a = 0xdead_BEEF\nb = 0o7\nc = 0b1\nd = 1.5\ne = 1e3\nf = -inf\ng = nan\nh = 1979-05-27 07:32:00Z # x", want: []string{
			"1:5: " + unsupported("0xdead_BEEF"), "2:5: " + unsupported("0o7"), "3:5: " + unsupported("0b1"), "4:5: " + unsupported("1.5"),
			"5:5: " + unsupported("1e3"), "6:5: " + unsupported("-inf"), "7:5: " + unsupported("nan"), "8:5: " + unsupported("1979-05-27 07:32:00Z")}},
		"multi-line strings":         {doc: "a = \"\"\"\none\n[two],\n\"\"\"\nb = '''three'''\nc", want: []string{"1:5: " + multiline, "5:5: " + multiline, "6:2: found the end of the line" + noEquals}},
		"arrays":                     {doc: "a = [\n 1,\n 'x', # y\n [1],\n [2]\n]\n\n[b]\nc = []\nd", want: []string{"1:5: " + arrays, "9:5: " + arrays, "10:2: found the end of the line" + noEquals}},
		"array without end":          {doc: "a = [\n[1],\n[b]\nb =", want: []string{"1:5: " + arrays, "4:4: " + noValue}},
		"inline tables":              {doc: "a = {}\nb = { c = [\n 1 ] }\n[b.c]\nd", want: []string{"1:5: " + inline, "2:5: " + inline, "5:2: found the end of the line" + noEquals}},
		"escapes":                    {doc: `a = "C:\path\n\x41"` + "\n" + `b = "\uD800"` + "\n" + `c = "\U00110000"` + "\n" + `d = "\u12"` + "\n" + `e = "\` + "\n" + `f = "\'"` + "\ng =", want: []string{"1:8: " + badEscape, "2:6: " + badEscape, "3:6: " + badEscape, "4:6: " + badEscape, "5:6: " + badEscape, "6:6: " + badEscape, "7:4: " + noValue}},
		"string without end":         {doc: "a = \"x\nb = 'y\nc = \"\\\"\n\"d = 1", want: []string{`1:5: this string has no end: add " after it`, "2:5: this string has no end: add ' after it", `3:5: this string has no end: add " after it`, `4:1: this string has no end: add " after it`}},
		"string broken over lines":   {doc: "a = \"first\nsecond\n third\"\nb =", want: []string{`1:5: this string has no end: add " after it`, "4:4: " + noValue}},
		"multi-line string as a key": {doc: "\"\"\"a\"\"\" = 1\n['''a''']", want: []string{`1:3: found "\""` + noEquals, `2:4: found "'", expected ] after the name of the table`}},
		"headers": {doc: "[]\n[a\n[[b]\n[c] d\n[e]]\n[ [f]]\n[g.]\n['h]\n", want: []string{
			`1:2: found "]"` + notKey, "2:3: found the end of the line, expected ] after the name of the table",
			`3:4: found "]", expected ]] after the name of the table`, `4:5: found "d"` + lineEnd, `5:4: found "]"` + lineEnd,
			`6:3: found "["` + notKey, `7:4: found "]"` + notKey, "8:2: this string has no end: add ' after it"}},
		"lines below a broken header are not the table above": {doc: "[a]\nx = 1\n[b\nx = 1\nx = 2\n[a]\nx = 1", want: []string{"3:3: found the end of the line, expected ] after the name of the table", `5:1: "x" is already in line 4` + duplicate, `6:2: "a" is already in line 1` + taken}},
		"duplicate keys": {doc: "a = 1\n\"a\" = 2\nb.c = 1\nb.c = 2\nb = 3", want: []string{`2:1: "a" is already in line 1` + duplicate, `4:3: "c" is already in line 3` + duplicate, `5:1: "b" is already in line 3` + duplicate}},
		"duplicate tables": {doc: "[a]\n[a]\n[a.b]\n[[a]]\n[[c]]\n[c]\n[d.e]\n[d]\n[d]\n[[d]]", want: []string{
			`2:2: "a" is already in line 1` + taken, `4:3: "a" is already in line 1` + taken, `6:2: "c" is already in line 5` + taken,
			`9:2: "d" is already in line 7` + taken, `10:3: "d" is already in line 7` + taken}},
		"tables made by dotted keys":              {doc: "a.b.c = 1\n[a]\n[a.b]\n[[a.b]]\n[a.d]\n", want: []string{`2:2: "a" is already in line 1` + taken, `3:4: "b" is already in line 1` + taken, `4:5: "b" is already in line 1` + taken}},
		"implicit table extended by a dotted key": {doc: "[a.b.c]\n[a]\nb.d = 1\n[a.b]\n", want: []string{`4:4: "b" is already in line 1` + taken}},
		"values are no tables":                    {doc: "a = 1\na.b = 2\n[a.c]\n[a]\n[[a]]", want: []string{`2:1: "a" is already in line 1` + taken, `3:2: "a" is already in line 1` + taken, `4:2: "a" is already in line 1` + taken, `5:3: "a" is already in line 1` + taken}},
		"implicit table as an array":              {doc: "[[a.b]]\n[[a]]\n", want: []string{`2:3: "a" is already in line 1` + taken}},
		"not UTF-8": {doc: "# \xff\xfe\na = \"\xc3\"\nb = \xed\xa0\x80\nc =", want: []string{
			"1:3: byte 0xFF is not UTF-8: save the file in that encoding", "2:6: byte 0xC3 is not UTF-8: save the file in that encoding",
			"3:5: byte 0xED is not UTF-8: save the file in that encoding", "4:4: " + noValue}},
		"control characters": {doc: "a = \"\x00\"\n# \x7f\n\x0b\n# \r\r\nb = 1\r", want: []string{"1:6: " + control(0), "2:3: " + control(0x7f), "3:1: " + control(0x0b), "4:3: " + control('\r'), "5:6: " + control('\r')}},
		"as deep as may be":  {doc: strings.Repeat("a.", 99) + "a = 1"},
		"header too deep":    {doc: "[" + strings.Repeat("a.", 100) + "a]\nb =", want: []string{"1:202: unsupported: a key of more than 100 parts; nest tables less deep", "2:4: " + noValue}},
	} {
		_, errs := parseTOML([]byte(row.doc))
		equal(t, name, strings.Join(tomlMessages(errs), "\n"), strings.Join(row.want, "\n"))
	}
}

// TestParseTOMLGivesUp: what is no TOML at all ends after a hundred errors.
func TestParseTOMLGivesUp(t *testing.T) {
	_, errs := parseTOML(bytes.Repeat([]byte("not TOML\n"), 1000))
	equal(t, "errors", len(errs), maxTOMLErrors)
	equal(t, "the last", errs[len(errs)-1].Error(), "100:5: too many errors: is this a TOML file?")
}

// TestParseTOMLHostile would run for minutes if anything took more than linear
// time, and would crash if anything recursed without bound.
func TestParseTOMLHostile(t *testing.T) {
	const size, limit = 1 << 20, 20 * time.Second
	var keys strings.Builder
	for i := range 100_000 {
		fmt.Fprintf(&keys, "key%d = %d\n", i, i)
	}
	for name, row := range map[string]struct {
		prefix, unit, suffix string
		valid                bool
	}{
		"100,000 keys":                 {prefix: keys.String(), valid: true},
		"array of tables":              {unit: "[[a]]\n", valid: true},
		"long string":                  {prefix: "a = '", unit: "é", suffix: "'", valid: true},
		"many escapes":                 {prefix: `a = "`, unit: `\t`, suffix: `"`, valid: true},
		"dotted header":                {prefix: "[", unit: "a."},
		"dotted key":                   {unit: "a . "},
		"brackets":                     {prefix: "a = ", unit: "["},
		"array of what may be headers": {prefix: "a = [\n", unit: "[x\n"},
		"strings without end":          {unit: "a = \"\n"},
		"quotation marks":              {unit: `"`},
		"long number":                  {prefix: "a = ", unit: "1_"},
		"not UTF-8":                    {unit: "\xff"},
	} {
		doc := row.prefix
		if row.unit != "" {
			doc += strings.Repeat(row.unit, size/len(row.unit)) + row.suffix
		}
		start := time.Now()
		_, errs := parseTOML([]byte(doc))
		took := time.Since(start)
		equal(t, name+": valid", len(errs) == 0, row.valid)
		holds(t, took <= limit, "%s: %d bytes took %v", name, len(doc), took)
	}
}

// FuzzParseTOML feeds anything to the parser. Errors must lie in the document and be in order. (What it takes is compared with another
// parser's reading by FuzzTOMLDifferential in e2e.)
func FuzzParseTOML(f *testing.F) {
	for _, doc := range []string{
		"a.b = 1\n[c.d]\n'e f' = \"\\u00e9\"\n[[g]]\nh = -1_0\n[[g]]\n[[g.i]]\n", "a = [\n1,\n# x\r\n", "[[a]\nb = {c = 1\n", "a = '''\n",
		"\ufeffa = 1 2\n\xff\n\x00", "a = 1979-05-27",
	} {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		_, errs := parseTOML(doc)
		last, lines := 0, bytes.Count(doc, []byte("\n"))+1
		for _, err := range errs {
			holds(t, err.pos.line > last && err.pos.line <= lines, "error %q comes after one in line %d of %d", err, last, lines)
			last = err.pos.line
		}
	})
}

// FuzzQuoteTOML reads back what quoteTOML writes, which is as plain as it can be.
func FuzzQuoteTOML(f *testing.F) {
	equal(f, "quoted", quoteTOML("é # \b\t\n\f\r\"\\é😀 '~\x7f"), `"é # \u0008\u0009\u000A\u000C\u000D\"\\é😀 '~\u007F"`)
	f.Add("\"\\\x00\u0085é\ufeff\U0010ffff\xff")
	f.Add("\"C:\\n\" \t\n\r\x1f\x7f # 'x' a\xff\xfeb")
	f.Fuzz(func(t *testing.T, text string) {
		quoted := quoteTOML(text)
		table, errs := parseTOML([]byte(quoted + " = " + quoted))
		e := table.entries[valid(text)]
		holds(t, len(errs) == 0 && e != nil && e.value == valid(text), "quoteTOML(%q) = %s, read as %v with the errors %v", text, quoted, table.entries, errs)
	})
}
