package main

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file reads the subset of TOML 1.0 (https://toml.io/en/v1.0.0) that has a
// statement a line and no values but strings, decimal integers and booleans. A
// document is either decoded exactly or refused, with the place and the reason
// of each problem: an invalid one is never accepted, and what is valid but
// beyond the subset is called "unsupported".

const (
	maxTOMLKeys   = 100 // parts of a key, so that recursion into tables is bounded
	maxTOMLErrors = 100 // of a file that is not TOML at all
)

// position is a place in a TOML document. Lines and columns count from 1,
// columns in characters.
type position struct{ line, col int }

// tomlError is one problem in a TOML document.
type tomlError struct {
	pos position
	msg string
}

// Error returns "LINE:COL: message"; the caller knows the file's name.
func (e tomlError) Error() string {
	return fmt.Sprintf("%d:%d: %s", e.pos.line, e.pos.col, e.msg)
}

// tomlTable is a decoded table.
type tomlTable struct {
	pos     position // of the key that named it first
	entries map[string]*tomlEntry
	kind    tableKind

	// incomplete means that a line of the table could not be read, which has
	// been reported: a key that seems to be missing may be on it.
	incomplete bool
}

// tomlKey is one part of a dotted key, decoded.
type tomlKey struct {
	name string
	pos  position
}

// tomlEntry is a key in a table and its value.
type tomlEntry struct {
	tomlKey
	value    any // string, int64, bool, *tomlTable or []*tomlTable
	valuePos position
}

// tableKind says what defined a table, and so what else may extend it.
type tableKind int

const (
	implicitTable tableKind = iota // a in [a.b]: anything, and it may be defined later
	dottedTable                    // a in a.b = 1: dotted keys, headers of sub-tables
	headerTable                    // [a]: headers of sub-tables
	elementTable                   // [[a]]: the same, while it is the last one
)

// parseTOML decodes a document. It reports every problem, at most one a line,
// in file order. The table holds all that could be read.
func parseTOML(src []byte) (*tomlTable, []tomlError) {
	root := newTable(position{1, 1}, headerTable)
	p := &tomlParser{root: root, table: root}
	// A leading byte order mark is a signature to Unicode, not text.
	text := strings.ReplaceAll(strings.TrimPrefix(string(src), "\ufeff"), "\r\n", "\n")
	for p.line = range strings.SplitSeq(text, "\n") {
		if p.number++; len(p.errs) < maxTOMLErrors {
			p.statement()
		}
	}
	if len(p.errs) == maxTOMLErrors {
		p.errs[maxTOMLErrors-1].msg = "too many errors: is this a TOML file?"
	}
	return root, p.errs
}

// newTable returns an empty table.
func newTable(pos position, kind tableKind) *tomlTable {
	return &tomlTable{pos: pos, kind: kind, entries: make(map[string]*tomlEntry)}
}

// tomlParser reads a document line by line. Once a line has failed, nothing is
// left of it: its other methods find nothing to read, and report nothing more.
type tomlParser struct {
	root  *tomlTable
	table *tomlTable // the one that the last header opened
	errs  []tomlError

	number int    // of the line
	line   string // without its end
	rest   string // of the line
	failed bool   // the line has an error

	// lost means that a value was refused that may go on in the lines below.
	// Until one looks like a statement, their errors would only follow from it.
	lost bool
}

// pos returns the place of what comes next.
func (p *tomlParser) pos() position {
	return position{p.number, utf8.RuneCountInString(p.line[:len(p.line)-len(p.rest)]) + 1}
}

// failAt gives up the line, and says why.
func (p *tomlParser) failAt(pos position, format string, args ...any) {
	if !p.failed && !p.lost {
		p.errs = append(p.errs, tomlError{pos, fmt.Sprintf(format, args...)})
	}
	p.failed, p.rest = true, ""
}

// at reports whether s comes next.
func (p *tomlParser) at(s string) bool { return strings.HasPrefix(p.rest, s) }

// accept consumes s if it comes next.
func (p *tomlParser) accept(s string) (found bool) {
	p.rest, found = strings.CutPrefix(p.rest, s)
	return found
}

// expect consumes s, which must come next, and the space behind it.
func (p *tomlParser) expect(s, want string) {
	if !p.accept(s) {
		p.unexpected(want)
	}
	p.space()
}

// unexpected says that what comes next is not what should.
func (p *tomlParser) unexpected(want string) {
	found := "the end of the line"
	if p.rest != "" {
		found = fmt.Sprintf("%.1q", p.rest)
	}
	p.failAt(p.pos(), "found %s, expected %s", found, want)
}

func (p *tomlParser) space() { p.rest = strings.TrimLeft(p.rest, " \t") }

// endOfLine consumes what may follow a statement.
func (p *tomlParser) endOfLine() {
	p.space()
	if p.rest != "" && !p.at("#") {
		p.unexpected("the end of the line")
	}
}

// statement parses a line: a header, an assignment or nothing.
func (p *tomlParser) statement() {
	p.failed = false
	text := strings.TrimLeft(p.line, " \t")
	if p.checkCharacters(); !p.failed {
		p.rest = text
	}
	switch {
	case text == "" || text[0] == '#':
	case text[0] == '[' && (!p.lost || text == p.line): // indented it is rather an element of the array above
		p.tableHeader()
	default:
		p.assignment()
	}
}

// checkCharacters refuses what TOML allows nowhere, not even in comments.
func (p *tomlParser) checkCharacters() {
	for p.rest = p.line; p.rest != ""; {
		r, size := utf8.DecodeRuneInString(p.rest)
		switch {
		case r == utf8.RuneError && size == 1:
			p.failAt(p.pos(), "byte 0x%02X is not UTF-8: save the file in that encoding", p.rest[0])
		case r < ' ' && r != '\t' || r == 0x7f:
			p.failAt(p.pos(), `control character U+%04X: remove it, or write \u%04[1]X in a string with double quotes (lines end with LF or CRLF)`, r)
		default:
			p.rest = p.rest[size:]
		}
	}
}

// tableHeader parses [table] or [[table]], which receives the lines below it.
func (p *tomlParser) tableHeader() {
	p.accept("[")
	kind, end := headerTable, "]"
	if p.accept("[") {
		kind, end = elementTable, "]]"
	}
	keys := p.key()
	p.expect(end, end+" after the name of the table")
	p.endOfLine()
	if !p.failed {
		p.lost = false
		p.table = p.open(p.parent(p.root, keys, implicitTable), keys[len(keys)-1], kind)
	} else if !p.lost {
		p.table = newTable(position{}, kind) // the lines below must not end up in the table above
	}
}

// assignment parses KEY = VALUE into the table of the last header. A value with
// errors is left out.
func (p *tomlParser) assignment() {
	keys := p.key()
	p.expect("=", "= after the key")
	p.lost = p.lost && p.failed // it looks like a statement
	pos := p.pos()
	v := p.value()
	p.endOfLine()
	if p.failed {
		p.table.incomplete = true
		return
	}
	t, k := p.parent(p.table, keys, dottedTable), keys[len(keys)-1]
	if old := t.entries[k.name]; old != nil {
		p.failAt(k.pos, "%.40q is already in line %d: remove one of the two", k.name, old.pos.line)
		return
	}
	t.entries[k.name] = &tomlEntry{k, v, pos}
}

// parent returns the table that holds the last of the keys, and makes those on
// the way.
func (p *tomlParser) parent(t *tomlTable, keys []tomlKey, kind tableKind) *tomlTable {
	for _, k := range keys[:len(keys)-1] {
		t = p.open(t, k, kind)
	}
	return t
}

// open returns the table k of t for a header or a dotted key, and makes it if
// need be. After an error it returns one that is not in the document.
func (p *tomlParser) open(t *tomlTable, k tomlKey, kind tableKind) *tomlTable {
	made := newTable(k.pos, kind)
	e := t.entries[k.name]
	if e == nil {
		e = &tomlEntry{k, made, k.pos}
		t.entries[k.name] = e
		if kind == elementTable {
			e.value = []*tomlTable{}
		}
	}
	switch old := e.value.(type) {
	case []*tomlTable:
		if kind == elementTable {
			e.value = append(old, made)
			return made
		}
		if kind == implicitTable {
			return old[len(old)-1]
		}
	case *tomlTable:
		// A dotted key may extend what no header defined, a header what nothing did.
		if old == made || kind == implicitTable || kind == dottedTable && old.kind <= kind || kind == headerTable && old.kind == implicitTable {
			old.kind = max(old.kind, kind)
			return old
		}
	}
	p.failAt(k.pos, "%.40q is already in line %d, and cannot be extended here: rename one of the two, or merge them", k.name, e.pos.line)
	return made
}

// key parses a bare, quoted or dotted key, and the space around it.
func (p *tomlParser) key() (keys []tomlKey) {
	const bare = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
	for len(keys) == 0 || p.accept(".") {
		p.space()
		k := tomlKey{pos: p.pos()}
		after := strings.TrimLeft(p.rest, bare)
		switch {
		case len(keys) == maxTOMLKeys:
			p.failAt(k.pos, "unsupported: a key of more than %d parts; nest tables less deep", maxTOMLKeys)
		case p.at(`"`) || p.at(`'`):
			k.name = p.quoted()
		case after == p.rest:
			p.unexpected("a key (A-Z a-z 0-9 _ -, or any text in quotes)")
		default:
			k.name, p.rest = p.rest[:len(p.rest)-len(after)], after
		}
		keys = append(keys, k)
		p.space()
	}
	return keys
}

// unsupportedValues are what values that may span lines begin and end with, and
// what to write instead.
var unsupportedValues = []struct{ start, end, instead string }{
	{`"""`, `"""`, `multi-line strings; write "…" on one line, with \n where a line ends`},
	{`'''`, `'''`, `multi-line strings; write "…" on one line, with \n where a line ends`},
	{"[", "]", "arrays; write a header [[name]] for each table of an array, and its keys below"},
	{"{", "}", "inline tables; write a header [name], and the keys below"},
}

// value parses any value.
func (p *tomlParser) value() (v any) {
	for _, u := range unsupportedValues {
		if text, found := strings.CutPrefix(p.rest, u.start); found {
			p.failAt(p.pos(), "unsupported: %s", u.instead)
			p.lost = !strings.Contains(text, u.end)
			return nil
		}
	}
	if !p.at(`"`) && !p.at(`'`) {
		return p.literal()
	}
	v = p.quoted()
	p.lost = p.failed && strings.Count(p.line, `"`)%2 > 0 // its end may be in the lines below
	return v
}

// quoted parses a basic or a literal string.
func (p *tomlParser) quoted() string {
	start, quote := p.pos(), p.rest[:1]
	p.accept(quote)
	var s strings.Builder
	for !p.failed && !p.accept(quote) {
		switch {
		case p.rest == "":
			p.failAt(start, "this string has no end: add %s after it", quote)
		case quote == `"` && p.at(`\`):
			s.WriteRune(p.escape())
		default:
			s.WriteByte(p.rest[0])
			p.rest = p.rest[1:]
		}
	}
	return s.String()
}

// escape parses an escape sequence of a basic string. Those of TOML mean the
// same in Go, which has more of them, and like TOML refuses surrogates.
func (p *tomlParser) escape() rune {
	r, _, after, err := strconv.UnquoteChar(p.rest, '"')
	if err != nil || !strings.Contains(`btnfr"\uU`, p.rest[1:2]) {
		p.failAt(p.pos(), `this escape is unknown: write \\ for a backslash, or one of \b \t \n \f \r \" \uXXXX \UXXXXXXXX with the number of a character`)
		return 0
	}
	p.rest = after
	return r
}

// literal parses a boolean or an integer, for which it takes everything up to a
// comment.
func (p *tomlParser) literal() any {
	text, _, _ := strings.Cut(p.rest, "#")
	text = strings.TrimRight(text, " \t")
	digits := strings.TrimLeft(text, "+-")
	n, err := strconv.ParseInt(text, 0, 64) // reads underscores as TOML does, but a leading zero as another base
	pos := p.pos()
	p.accept(text)
	switch {
	case text == "":
		p.unexpected("a value")
	case text == "true" || text == "false":
		return text == "true"
	case err == nil && (digits == "0" || digits[0] != '0'):
		return n
	case strings.ContainsAny(text[:1], "+-.0123456789") || text == "inf" || text == "nan": // floats, dates, IP addresses…
		p.failAt(pos, "unsupported: %#.40q; write %.40[1]q, or a whole number of at most 64 bits in decimal digits without leading zeros", text)
	default:
		p.failAt(pos, "unknown value %#.40q: write %.40[1]q for text, true or false in lower case, and one setting on a line", text)
	}
	return nil
}

// quoteTOML writes s as a basic string, which any TOML reader reads back. TOML
// has no way to write bytes that are not UTF-8: they become U+FFFD.
func quoteTOML(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			fmt.Fprintf(&b, `\%c`, r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	return `"` + b.String() + `"`
}
