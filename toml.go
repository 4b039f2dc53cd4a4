package main

import (
	"cmp"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// This file reads TOML 1.0 (https://toml.io/en/v1.0.0) except for dates and
// times, which no setting of the proxy needs. A document is either decoded
// exactly or refused, with the place and the reason of each problem: an
// invalid one is never accepted, and what is valid but beyond this parser is
// called "unsupported".

const (
	// maxNesting is how deep tables and arrays may lie in one another, so that
	// no document can exhaust the stack of this parser or of its callers.
	maxNesting = 100

	// maxErrors bounds the work on a file that is not TOML at all.
	maxErrors = 100
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

// tomlKey is one segment of a dotted key, decoded.
type tomlKey struct {
	name string
	pos  position
}

// tomlValue is a decoded value and where it starts.
type tomlValue struct {
	pos position
	v   any // string, int64, float64, bool, []*tomlValue or *tomlTable

	ofHeaders bool // an array that [[headers]] made: only they may extend it
}

// tomlTable is a decoded table. It keeps its keys in file order.
type tomlTable struct {
	pos     position // of its header or brace, or of the key that implied it
	entries []tomlEntry

	// incomplete means that a line of the table could not be read, which has
	// been reported: a key that seems to be missing may be on it.
	incomplete bool

	kind  tableKind
	index map[string]*tomlValue
}

// tomlEntry is a key in a table, where the key stands, and its value.
type tomlEntry struct {
	key   string
	pos   position
	value *tomlValue
}

// tableKind says what defined a table, and so what else may extend it.
type tableKind int

const (
	implicitTable tableKind = iota // a in [a.b]: anything, and it may be defined later
	dottedTable                    // a in a.b = 1: dotted keys, headers of sub-tables
	headerTable                    // [a] or [[a]]: headers of sub-tables
	inlineTable                    // a = {}: nothing
)

// get returns the value of a key, or nil if the table lacks it.
func (t *tomlTable) get(key string) *tomlValue { return t.index[key] }

// add appends an entry, whose key must be new.
func (t *tomlTable) add(k tomlKey, v *tomlValue) {
	if t.index == nil {
		t.index = make(map[string]*tomlValue)
	}
	t.index[k.name] = v
	t.entries = append(t.entries, tomlEntry{k.name, k.pos, v})
}

// addTable appends an entry with a new table, and returns the table.
func (t *tomlTable) addTable(k tomlKey, kind tableKind) *tomlTable {
	sub := &tomlTable{pos: k.pos, kind: kind}
	t.add(k, &tomlValue{pos: k.pos, v: sub})
	return sub
}

// addElement appends a table to an array that is made of headers.
func (v *tomlValue) addElement(pos position) *tomlTable {
	t := &tomlTable{pos: pos, kind: headerTable}
	v.v = append(v.v.([]*tomlValue), &tomlValue{pos: pos, v: t})
	return t
}

// String describes a value in an error message.
func (v *tomlValue) String() string {
	what := "a value"
	switch x := v.v.(type) {
	case *tomlTable:
		what = [...]string{"a table", "a table made by dotted keys", "a table with a header", "an inline table"}[x.kind]
	case []*tomlValue:
		what = "an array"
		if v.ofHeaders {
			what = "an array of tables"
		}
	}
	return fmt.Sprintf("%s (line %d)", what, v.pos.line)
}

// parseTOML decodes a document. It reports every problem, in file order: after
// a syntax error it resumes behind the broken statement, so that one mistake
// is one error. The table holds all that could be read.
func parseTOML(src []byte) (*tomlTable, []tomlError) {
	root := &tomlTable{pos: position{1, 1}, kind: headerTable}
	p := &parser{
		// A leading byte order mark is a signature to Unicode, not text.
		src:      strings.TrimPrefix(string(src), "\ufeff"),
		pos:      position{1, 1},
		root:     root,
		table:    root,
		badLines: make(map[int]bool),
	}
	p.checkCharacters()
	for !p.eof() && len(p.errs) < maxErrors {
		p.statement()
	}
	slices.SortStableFunc(p.errs, func(a, b tomlError) int {
		return cmp.Or(cmp.Compare(a.pos.line, b.pos.line), cmp.Compare(a.pos.col, b.pos.col))
	})
	if len(p.errs) == maxErrors {
		p.errs[maxErrors-1].msg = "too many errors: is this a TOML file?"
	}
	return root, p.errs
}

// parser is a recursive-descent parser. A method that has lost its way records
// why and returns false; statement then finds the place to resume. A copy of
// a parser serves to look ahead.
type parser struct {
	src string
	off int      // of what comes next, in bytes
	pos position // of what comes next

	root  *tomlTable
	table *tomlTable // the one that the last header opened

	errs     []tomlError
	badLines map[int]bool // lines with characters that TOML forbids everywhere
	unclosed bool         // a string of this statement has no end
}

// fail records an error, and returns false for the caller to return. A line
// with forbidden characters has its error already: the rest may follow from it.
func (p *parser) fail(pos position, format string, args ...any) bool {
	if !p.badLines[pos.line] && len(p.errs) < maxErrors {
		p.errs = append(p.errs, tomlError{pos, fmt.Sprintf(format, args...)})
	}
	return false
}

// unexpected records that what comes next is not what the grammar wants.
func (p *parser) unexpected(want string) bool {
	r, _ := utf8.DecodeRuneInString(p.rest())
	found := strconv.QuoteRune(r)
	if p.eof() || p.atNewline() {
		found = "the end of the line"
	}
	return p.fail(p.pos, "found %s, expected %s", found, want)
}

func (p *parser) rest() string     { return p.src[p.off:] }
func (p *parser) eof() bool        { return p.off == len(p.src) }
func (p *parser) at(s string) bool { return strings.HasPrefix(p.rest(), s) }
func (p *parser) atNewline() bool  { return p.at("\n") || p.at("\r\n") }

// advance consumes n bytes, which must end with a character, and returns them.
func (p *parser) advance(n int) string {
	text := p.rest()[:n]
	p.off += n
	for _, r := range text {
		p.pos.col++
		if r == '\n' {
			p.pos = position{p.pos.line + 1, 1}
		}
	}
	return text
}

// next consumes one character.
func (p *parser) next() string {
	_, size := utf8.DecodeRuneInString(p.rest())
	return p.advance(size)
}

// accept consumes s if it comes next.
func (p *parser) accept(s string) bool {
	if p.at(s) {
		p.advance(len(s))
		return true
	}
	return false
}

// take consumes as many of the given characters as there are.
func (p *parser) take(chars string) string {
	return p.advance(len(p.rest()) - len(strings.TrimLeft(p.rest(), chars)))
}

// takeUntil consumes everything before the next of the given characters.
func (p *parser) takeUntil(chars string) string {
	if n := strings.IndexAny(p.rest(), chars); n >= 0 {
		return p.advance(n)
	}
	return p.advance(len(p.rest()))
}

func (p *parser) space()        { p.take(" \t") }
func (p *parser) newline() bool { return p.accept("\n") || p.accept("\r\n") }

func (p *parser) comment() {
	if p.at("#") {
		p.takeUntil("\n")
	}
}

// skipLine moves to the start of the next line.
func (p *parser) skipLine() {
	p.takeUntil("\n")
	p.accept("\n")
}

// checkCharacters reports the first character of each line that TOML forbids
// everywhere, so that parsing need not look for them.
func (p *parser) checkCharacters() {
	for q := *p; !q.eof(); q.next() {
		if problem := q.forbidden(); problem != "" {
			p.fail(q.pos, "%s", problem)
			p.badLines[q.pos.line] = true
		}
	}
}

// forbidden says what is wrong with the next character wherever it stands.
func (p *parser) forbidden() string {
	r, size := utf8.DecodeRuneInString(p.rest())
	switch {
	case r == utf8.RuneError && size == 1:
		return fmt.Sprintf("byte 0x%02X is not UTF-8: save the file in that encoding", p.src[p.off])
	case r == '\r' && !p.atNewline():
		return "carriage return without line feed: end lines with LF or CRLF"
	case r < ' ' && !strings.ContainsRune("\t\r\n", r) || r == 0x7f:
		return fmt.Sprintf(`control character U+%04X: remove it, or write \u%04[1]X in a string with double quotes`, r)
	}
	return ""
}

// statement parses a header, an assignment or an empty line.
func (p *parser) statement() {
	p.unclosed = false
	p.space()
	start := *p
	switch {
	case p.at("["):
		if !p.header() || !p.endOfLine() {
			p.resume(*p)
		}
	case p.at("#") || p.atNewline() || p.eof() || p.keyValue(p.table, 0):
		if !p.endOfLine() {
			p.resume(start)
		}
	default:
		p.resume(start)
	}
}

func (p *parser) endOfLine() bool {
	p.space()
	p.comment()
	return p.eof() || p.newline() || p.unexpected("the end of the line")
}

// resume moves on after a syntax error: behind the statement, from a place in
// it outside of brackets, or if it has no end, to the next line that looks
// like a statement.
func (p *parser) resume(from parser) {
	errorLine := p.pos.line
	end, closed := from.skipStatement()
	if p.eof() {
		return
	}
	if closed && !p.unclosed {
		p.off, p.pos = end.off, end.pos
		return
	}
	for from.skipLine(); !from.eof() && (from.pos.line < errorLine || !from.startsStatement()); from.skipLine() {
	}
	p.off, p.pos = from.off, from.pos
}

// skipStatement returns a parser behind a statement, by looking at nothing but
// strings, comments and brackets; false if a bracket or string has no end.
func (p parser) skipStatement() (parser, bool) {
	p.errs = nil
	open := ""
	for !p.eof() {
		switch c := p.src[p.off]; c {
		case '"', '\'':
			if _, ok := p.quoted(); !ok && p.eof() {
				return p, false
			}
			continue
		case '#':
			p.comment()
			continue
		case '[', '{':
			open += string(c)
		case ']', '}':
			open = open[:max(0, len(open)-1)]
		}
		if p.next() != "\n" {
			continue
		}
		if open == "" {
			return p, true
		}
		if strings.HasSuffix(open, "[") && p.startsKeyValue() {
			return p, false
		}
	}
	return p, open == ""
}

// startsStatement reports whether a line looks like a header or an assignment.
func (p parser) startsStatement() bool {
	p.errs = nil
	p.space()
	if !p.at("[") {
		return p.startsKeyValue()
	}
	_, _, ok := p.headerKey()
	return ok && p.endOfLine()
}

// startsKeyValue reports whether a key and an equals sign come next.
func (p parser) startsKeyValue() bool {
	p.errs = nil
	_, ok := p.key()
	return ok && p.at("=")
}

// header parses [table] or [[table]], which receives the lines below it.
func (p *parser) header() bool {
	// Lines below a wrong header must not end up in the table above it.
	p.table = &tomlTable{}
	pos := p.pos
	keys, array, ok := p.headerKey()
	if !ok {
		return false
	}
	if t := p.open(keys, array); t != nil {
		t.pos = pos
		p.table = t
	}
	return true
}

func (p *parser) headerKey() (keys []tomlKey, array, ok bool) {
	end := "]"
	if array = p.accept("[["); array {
		end = "]]"
	} else {
		p.accept("[")
	}
	if keys, ok = p.key(); ok && !p.accept(end) {
		ok = p.unexpected(end + " after the name of the table")
	}
	return keys, array, ok
}

// open returns the table that a header defines, or nil after an error.
func (p *parser) open(keys []tomlKey, array bool) *tomlTable {
	t, k := p.parent(p.root, keys, false)
	if t == nil {
		return nil
	}
	v := t.get(k.name)
	switch {
	case v == nil && array:
		v = &tomlValue{pos: k.pos, v: []*tomlValue(nil), ofHeaders: true}
		t.add(k, v)
		return v.addElement(k.pos)
	case v == nil:
		return t.addTable(k, headerTable)
	case array && v.ofHeaders:
		return v.addElement(k.pos)
	}
	if sub, ok := v.v.(*tomlTable); ok && sub.kind == implicitTable && !array {
		sub.kind = headerTable
		return sub
	}
	p.fail(k.pos, "%q is already %s: rename one of the two, or merge them", clip(k.name), v)
	return nil
}

// parent returns the table that holds the last of the keys, and that key. It
// makes the tables on the way, or returns nil after an error.
func (p *parser) parent(t *tomlTable, keys []tomlKey, dotted bool) (*tomlTable, tomlKey) {
	last := len(keys) - 1
	for _, k := range keys[:last] {
		if t = p.subTable(t, k, dotted); t == nil {
			break
		}
	}
	return t, keys[last]
}

// subTable returns the table k of t, for a dotted key or a header to go
// through, and makes it if need be. It returns nil if they may not.
func (p *parser) subTable(t *tomlTable, k tomlKey, dotted bool) *tomlTable {
	v := t.get(k.name)
	switch {
	case v == nil && dotted:
		return t.addTable(k, dottedTable)
	case v == nil:
		return t.addTable(k, implicitTable)
	case v.ofHeaders && !dotted:
		elements := v.v.([]*tomlValue)
		return elements[len(elements)-1].v.(*tomlTable)
	}
	sub, ok := v.v.(*tomlTable)
	if !ok || sub.kind == inlineTable || sub.kind == headerTable && dotted {
		p.fail(k.pos, "%q is already %s: it cannot be extended here", clip(k.name), v)
		return nil
	}
	if dotted {
		sub.kind = dottedTable // a header may no longer define it
	}
	return sub
}

// key parses a bare, quoted or dotted key, and the space around it.
func (p *parser) key() ([]tomlKey, bool) {
	const bare = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
	var keys []tomlKey
	for len(keys) == 0 || p.accept(".") {
		p.space()
		k, ok := tomlKey{pos: p.pos}, true
		switch {
		case len(keys) == maxNesting:
			ok = p.fail(p.pos, "unsupported: a key of more than %d parts", maxNesting)
		case p.at(`"""`) || p.at(`'''`):
			ok = p.fail(p.pos, "a key cannot be a multi-line string: use one quotation mark")
		case p.at(`"`) || p.at(`'`):
			k.name, ok = p.quoted()
		default:
			k.name = p.take(bare)
			ok = k.name != "" || p.unexpected("a key (A-Z a-z 0-9 _ -, or any text in quotes)")
		}
		if !ok {
			return nil, false
		}
		keys = append(keys, k)
		p.space()
	}
	return keys, true
}

// keyValue parses an assignment into t. A value with errors is left out.
func (p *parser) keyValue(t *tomlTable, depth int) bool {
	before := len(p.errs)
	keys, ok := p.key()
	if ok && !p.accept("=") {
		ok = p.unexpected("= after the key")
	}
	var v *tomlValue
	if ok {
		p.space()
		v, ok = p.value(depth + len(keys))
	}
	if !ok || len(p.errs) > before {
		t.incomplete = true
		return ok
	}
	t, k := p.parent(t, keys, true)
	if t == nil {
		return true
	}
	if old := t.get(k.name); old != nil {
		p.fail(k.pos, "%q is already %s: remove one of the two", clip(k.name), old)
		return true
	}
	t.add(k, v)
	return true
}

// value parses any value, which lies in depth tables and arrays.
func (p *parser) value(depth int) (*tomlValue, bool) {
	v, ok := &tomlValue{pos: p.pos}, false
	switch {
	case depth > maxNesting:
		p.fail(p.pos, "unsupported: more than %d levels of tables and arrays in one another", maxNesting)
	case p.at(`"`) || p.at(`'`):
		v.v, ok = p.quoted()
	case p.at("["):
		v.v, ok = p.array(depth)
	case p.at("{"):
		v.v, ok = p.inline(depth)
	default:
		v.v, ok = p.literal()
	}
	return v, ok
}

// array parses an array, which may span lines.
func (p *parser) array(depth int) ([]*tomlValue, bool) {
	start := p.pos
	p.next()
	elements := []*tomlValue{}
	for comma := true; ; comma = p.accept(",") {
		p.blank()
		switch {
		case p.accept("]"):
			return elements, true
		case p.eof(), p.pos.line > start.line && p.startsKeyValue():
			return nil, p.fail(start, "this array has no end: add ] after its last value")
		case !comma:
			return nil, p.unexpected(", or ] after a value of an array")
		}
		v, ok := p.value(depth + 1)
		if !ok {
			return nil, false
		}
		elements = append(elements, v)
		p.blank()
	}
}

// blank consumes what may stand around the values of an array.
func (p *parser) blank() {
	for ok := true; ok; ok = p.newline() {
		p.space()
		p.comment()
	}
}

// inline parses an inline table, which must stay on one line.
func (p *parser) inline(depth int) (*tomlTable, bool) {
	t := &tomlTable{pos: p.pos, kind: inlineTable}
	p.next()
	p.space()
	closed := p.accept("}")
	for !closed {
		if !p.lineGoesOn() || !p.keyValue(t, depth) || !p.lineGoesOn() {
			return nil, false
		}
		closed = p.accept("}")
		if !closed && !p.accept(",") {
			return nil, p.unexpected(", or } after a value of an inline table")
		}
	}
	return t, true
}

func (p *parser) lineGoesOn() bool {
	p.space()
	if p.eof() || p.at("#") || p.atNewline() {
		return p.fail(p.pos, "an inline table must end on its line: add }, or write it as a table with a header")
	}
	return true
}

// quoted parses a string of any of the four kinds. A bad escape is reported,
// but the string goes on.
func (p *parser) quoted() (string, bool) {
	start := p.pos
	quote := p.next()
	end := quote
	multiline := p.accept(quote + quote)
	if multiline {
		end = quote + quote + quote
		p.newline()
	}
	var s strings.Builder
	for !p.at(end) {
		switch {
		case p.eof() || !multiline && p.atNewline():
			p.unclosed = true
			return "", p.fail(start, "this string has no end: add %s after it", end)
		case p.at(`\`) && quote == `"`:
			s.WriteString(p.escape(multiline))
		default:
			s.WriteString(p.next())
		}
	}
	for range 2 { // quotation marks may also stand just before the last three
		if multiline && p.at(quote+end) {
			s.WriteString(p.next())
		}
	}
	p.accept(end)
	return s.String(), true
}

var (
	tomlEscape     = regexp.MustCompile(`^\\([btnfr"\\]|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8})`)
	tomlInteger    = regexp.MustCompile(`^([+-]?(0|[1-9](_?[0-9])*)|0x[0-9A-Fa-f](_?[0-9A-Fa-f])*|0o[0-7](_?[0-7])*|0b[01](_?[01])*)$`)
	tomlFloat      = regexp.MustCompile(`^[+-]?(0|[1-9](_?[0-9])*)(\.[0-9](_?[0-9])*)?([eE][+-]?[0-9](_?[0-9])*)?$`)
	tomlDateOrTime = regexp.MustCompile(`^([0-9]{4}-[0-9]{2}|[0-9]{2}:)`)
)

// escape parses an escape sequence of a basic string.
func (p *parser) escape(multiline bool) string {
	start, ahead := p.pos, *p
	ahead.next()
	// A backslash at the end of a line removes all space up to the next text.
	if ahead.space(); multiline && ahead.atNewline() {
		ahead.take(" \t\r\n")
		*p = ahead
		return ""
	}
	sequence := tomlEscape.FindString(p.rest()[:min(len(`\U00000000`), len(p.rest()))])
	// What remains is the same in Go, down to the refusal of surrogates.
	r, _, _, err := strconv.UnquoteChar(p.advance(max(1, len(sequence))), '"')
	if err != nil {
		p.fail(start, `\ must begin one of \b \t \n \f \r \" \\ \uXXXX \UXXXXXXXX with the number of a character: write \\ for a backslash`)
	}
	return string(r)
}

// literal parses a boolean or a number.
func (p *parser) literal() (any, bool) {
	pos := p.pos
	text := p.takeUntil(" \t\r\n,[]{}#=\"'")
	digits, shown := strings.ReplaceAll(text, "_", ""), clip(text)
	switch {
	case text == "":
		return nil, p.unexpected("a value")
	case text == "true" || text == "false":
		return text == "true", true
	case text == "inf" || text == "+inf":
		return math.Inf(1), true
	case text == "-inf":
		return math.Inf(-1), true
	case strings.TrimLeft(text[:1], "+-")+text[1:] == "nan":
		return math.NaN(), true
	case tomlInteger.MatchString(text):
		if n, err := strconv.ParseInt(digits, 0, 64); err == nil {
			return n, true
		}
		return nil, p.fail(pos, "%s is too large: an integer has 64 bits, one for the sign", shown)
	case tomlFloat.MatchString(text):
		if f, err := strconv.ParseFloat(digits, 64); err == nil {
			return f, true
		}
		return nil, p.fail(pos, "unsupported: %s is too large for 64 bits", shown)
	case tomlDateOrTime.MatchString(text):
		return nil, p.fail(pos, "unsupported: dates and times; put %s in quotes", shown)
	case strings.ContainsAny(text[:1], "+-.0123456789"):
		return nil, p.fail(pos, "%s is not a number: digits surround each point and underscore, no zero leads; put text in quotes", shown)
	}
	return nil, p.fail(pos, "%s is not a value: put text in quotes, and write true, false, inf and nan in lower case", shown)
}

// clip shortens a text for an error message.
func clip(text string) string {
	const most = 40
	if chars := []rune(text); len(chars) > most {
		return string(chars[:most]) + "…"
	}
	return text
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
