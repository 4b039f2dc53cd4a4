package main

import (
	"cmp"
	"fmt"
	"math"
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
	// maxTOMLDepth is how deep tables and arrays may lie in one another, so that
	// no document can exhaust the stack of this parser or of its callers.
	maxTOMLDepth = 100

	// maxTOMLErrors bounds the work on a file that is not TOML at all.
	maxTOMLErrors = 100
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
	pos     position // of its opening brace, or of the key that named it first
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
	p := &tomlParser{
		// A leading byte order mark is a signature to Unicode, not text.
		src:      strings.TrimPrefix(string(src), "\ufeff"),
		pos:      position{1, 1},
		root:     root,
		table:    root,
		badLines: make(map[int]bool),
	}
	p.checkCharacters()
	for !p.eof() && len(p.errs) < maxTOMLErrors {
		p.statement()
	}
	slices.SortStableFunc(p.errs, func(a, b tomlError) int {
		return cmp.Or(cmp.Compare(a.pos.line, b.pos.line), cmp.Compare(a.pos.col, b.pos.col))
	})
	if len(p.errs) == maxTOMLErrors {
		p.errs[maxTOMLErrors-1].msg = "too many errors: is this a TOML file?"
	}
	return root, p.errs
}

// tomlParser is a recursive-descent parser. A method that has lost its way records
// why and returns false; statement then finds the place to resume. A copy of
// a parser serves to look ahead.
type tomlParser struct {
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
func (p *tomlParser) fail(pos position, format string, args ...any) bool {
	if !p.badLines[pos.line] && len(p.errs) < maxTOMLErrors {
		p.errs = append(p.errs, tomlError{pos, fmt.Sprintf(format, args...)})
	}
	return false
}

// unexpected records that what comes next is not what the grammar wants.
func (p *tomlParser) unexpected(want string) bool {
	r, _ := utf8.DecodeRuneInString(p.rest())
	found := strconv.QuoteRune(r)
	if p.eof() || p.atNewline() {
		found = "the end of the line"
	}
	return p.fail(p.pos, "found %s, expected %s", found, want)
}

func (p *tomlParser) rest() string     { return p.src[p.off:] }
func (p *tomlParser) eof() bool        { return p.off == len(p.src) }
func (p *tomlParser) at(s string) bool { return strings.HasPrefix(p.rest(), s) }
func (p *tomlParser) atNewline() bool  { return p.at("\n") || p.at("\r\n") }

// advance consumes n bytes, which must end with a character, and returns them.
func (p *tomlParser) advance(n int) string {
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
func (p *tomlParser) next() string {
	_, size := utf8.DecodeRuneInString(p.rest())
	return p.advance(size)
}

// accept consumes s if it comes next.
func (p *tomlParser) accept(s string) bool {
	if p.at(s) {
		p.advance(len(s))
		return true
	}
	return false
}

// take consumes as many of the given characters as there are.
func (p *tomlParser) take(chars string) string {
	return p.advance(len(p.rest()) - len(strings.TrimLeft(p.rest(), chars)))
}

// takeUntil consumes everything before the next of the given characters.
func (p *tomlParser) takeUntil(chars string) string {
	if n := strings.IndexAny(p.rest(), chars); n >= 0 {
		return p.advance(n)
	}
	return p.advance(len(p.rest()))
}

func (p *tomlParser) space()        { p.take(" \t") }
func (p *tomlParser) newline() bool { return p.accept("\n") || p.accept("\r\n") }

func (p *tomlParser) comment() {
	if p.at("#") {
		p.takeUntil("\n")
	}
}

// skipLine moves to the start of the next line.
func (p *tomlParser) skipLine() {
	p.takeUntil("\n")
	p.accept("\n")
}

// checkCharacters reports the first character of each line that TOML forbids
// everywhere, so that parsing need not look for them.
func (p *tomlParser) checkCharacters() {
	for q := *p; !q.eof() && len(p.errs) < maxTOMLErrors; q.next() {
		if problem := q.forbidden(); problem != "" {
			p.fail(q.pos, "%s", problem)
			p.badLines[q.pos.line] = true
			q.takeUntil("\n")
		}
	}
}

// forbidden says what is wrong with the next character wherever it stands.
func (p *tomlParser) forbidden() string {
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
func (p *tomlParser) statement() {
	p.unclosed = false
	p.space()
	start, ok := *p, true
	switch {
	case p.at("["):
		ok = p.header()
		start = *p // the brackets of a header close no value
	case !p.at("#") && !p.atNewline() && !p.eof():
		ok = p.keyValue(p.table, 0)
	}
	if !ok || !p.endOfLine() {
		p.resume(start)
	}
}

func (p *tomlParser) endOfLine() bool {
	p.space()
	p.comment()
	return p.eof() || p.newline() || p.unexpected("the end of the line")
}

// resume moves on after a syntax error: behind the statement, from a place in
// it outside of brackets, or if it has no end, to the next line that looks
// like a statement.
func (p *tomlParser) resume(from tomlParser) {
	end, closed := from.skipStatement()
	switch {
	case p.eof():
	case closed && !p.unclosed:
		p.off, p.pos = end.off, end.pos
	default:
		errorLine := p.pos.line
		from.skipLine()
		for !from.eof() && (from.pos.line < errorLine || !from.startsStatement()) {
			from.skipLine()
		}
		p.off, p.pos = from.off, from.pos
	}
}

// skipStatement returns a parser behind a statement, by looking at nothing but
// strings, comments and brackets; false if a bracket or string has no end.
func (p tomlParser) skipStatement() (tomlParser, bool) {
	p.errs = nil
	var open []byte // brackets
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
			open = append(open, c)
		case ']', '}':
			open = open[:max(0, len(open)-1)]
		}
		if p.next() == "\n" && len(open) == 0 {
			return p, true
		}
	}
	return p, len(open) == 0
}

// startsStatement reports whether a line looks like a header or an assignment.
func (p tomlParser) startsStatement() bool {
	p.errs = nil
	p.space()
	if !p.at("[") {
		return p.startsKeyValue()
	}
	_, _, ok := p.headerKey()
	return ok && p.endOfLine()
}

// startsKeyValue reports whether a key and an equals sign come next.
func (p tomlParser) startsKeyValue() bool {
	p.errs = nil
	_, ok := p.key()
	return ok && p.at("=")
}

// header parses [table] or [[table]], which receives the lines below it.
func (p *tomlParser) header() bool {
	// Lines below a wrong header must not end up in the table above it.
	p.table = &tomlTable{}
	keys, array, ok := p.headerKey()
	if !ok {
		return false
	}
	if t := p.open(keys, array); t != nil {
		p.table = t
	}
	return true
}

func (p *tomlParser) headerKey() (keys []tomlKey, array, ok bool) {
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
func (p *tomlParser) open(keys []tomlKey, array bool) *tomlTable {
	t, k := p.parent(p.root, keys, false)
	if t == nil {
		return nil
	}
	v := t.get(k.name)
	if v == nil && array {
		v = &tomlValue{pos: k.pos, v: []*tomlValue{}, ofHeaders: true}
		t.add(k, v)
	}
	if v == nil {
		return t.addTable(k, headerTable)
	}
	switch x := v.v.(type) {
	case []*tomlValue:
		if array && v.ofHeaders {
			element := &tomlTable{pos: k.pos, kind: headerTable}
			v.v = append(x, &tomlValue{pos: k.pos, v: element})
			return element
		}
	case *tomlTable:
		if !array && x.kind == implicitTable {
			x.kind = headerTable
			return x
		}
	}
	p.fail(k.pos, "%q is already %s: rename one of the two, or merge them", clip(k.name), v)
	return nil
}

// parent returns the table that holds the last of the keys, and that key. It
// makes the tables on the way, or returns nil after an error.
func (p *tomlParser) parent(t *tomlTable, keys []tomlKey, dotted bool) (*tomlTable, tomlKey) {
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
func (p *tomlParser) subTable(t *tomlTable, k tomlKey, dotted bool) *tomlTable {
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
func (p *tomlParser) key() ([]tomlKey, bool) {
	const bare = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"
	var keys []tomlKey
	for len(keys) == 0 || p.accept(".") {
		p.space()
		k, ok := tomlKey{pos: p.pos}, true
		switch {
		case len(keys) == maxTOMLDepth:
			ok = p.fail(p.pos, "unsupported: a key of more than %d parts", maxTOMLDepth)
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
func (p *tomlParser) keyValue(t *tomlTable, depth int) bool {
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
func (p *tomlParser) value(depth int) (*tomlValue, bool) {
	v, ok := &tomlValue{pos: p.pos}, false
	switch {
	case depth > maxTOMLDepth:
		p.fail(p.pos, "unsupported: more than %d levels of tables and arrays in one another", maxTOMLDepth)
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
func (p *tomlParser) array(depth int) ([]*tomlValue, bool) {
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
func (p *tomlParser) blank() {
	for ok := true; ok; ok = p.newline() {
		p.space()
		p.comment()
	}
}

// inline parses an inline table, which must stay on one line.
func (p *tomlParser) inline(depth int) (*tomlTable, bool) {
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

func (p *tomlParser) lineGoesOn() bool {
	p.space()
	if p.eof() || p.at("#") || p.atNewline() {
		return p.fail(p.pos, "an inline table must end on its line: add }, or write it as a table with a header")
	}
	return true
}

// quoted parses a string of any of the four kinds. A bad escape is reported,
// but the string goes on.
func (p *tomlParser) quoted() (string, bool) {
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

// escape parses an escape sequence of a basic string.
func (p *tomlParser) escape(multiline bool) string {
	start, ahead := p.pos, *p
	ahead.next()
	ahead.space()
	if ahead.eof() || ahead.atNewline() {
		if multiline { // all space up to the next text is left out
			ahead.take(" \t\r\n")
		}
		*p = ahead
		return ""
	}
	// These sequences mean the same in Go, which also refuses surrogates.
	r, _, _, err := strconv.UnquoteChar(p.advance(max(1, escapeLength(p.rest()))), '"')
	if err != nil {
		p.fail(start, `this escape is unknown: write \\ for a backslash, or one of \b \t \n \f \r \" \uXXXX \UXXXXXXXX with the number of a character`)
	}
	return string(r)
}

// literal parses a boolean or a number.
func (p *tomlParser) literal() (any, bool) {
	pos := p.pos
	text := p.takeUntil(" \t\r\n,[]{}#=\"'")
	digits := strings.ReplaceAll(text, "_", "")
	shown := strings.Trim(strconv.Quote(clip(text)), `"`) // invisible characters escaped
	switch {
	case text == "":
		return nil, p.unexpected("a value")
	case text == "true" || text == "false":
		return text == "true", true
	case text == "inf" || text == "+inf":
		return math.Inf(1), true
	case text == "-inf":
		return math.Inf(-1), true
	case text == "nan" || text == "+nan" || text == "-nan":
		return math.NaN(), true
	case isInteger(text):
		if n, err := strconv.ParseInt(digits, 0, 64); err == nil {
			return n, true
		}
		return nil, p.fail(pos, "%s is too large: an integer has 64 bits, one for the sign", shown)
	case isFloat(text):
		if f, err := strconv.ParseFloat(digits, 64); err == nil {
			return f, true
		}
		return nil, p.fail(pos, "unsupported: %s is too large for 64 bits", shown)
	case isDateOrTime(text):
		return nil, p.fail(pos, `unsupported: dates and times; write "%s"`, shown)
	case strings.ContainsAny(text[:1], "+-.0123456789"):
		return nil, p.fail(pos, `%s is not a number: write digits on both sides of a point or underscore, and no leading zeros; put text in "quotes"`, shown)
	}
	return nil, p.fail(pos, `%s is not a value: put text in "quotes", and write true, false, inf and nan in lower case`, shown)
}

// The sets of digits. (Package regexp would say the same in four lines and 240 KB.)
const (
	hexDigits     = "0123456789abcdefABCDEF"
	decimalDigits = "0123456789"
	octalDigits   = "01234567"
	binaryDigits  = "01"
)

// escapeLength returns the length of the escape sequence that s begins with, 0 if it is none.
func escapeLength(s string) int {
	if len(s) < 2 || !strings.Contains(`btnfr"\uU`, s[1:2]) {
		return 0
	}
	n := len(`\n`)
	switch s[1] {
	case 'u':
		n = len(`\u0000`)
	case 'U':
		n = len(`\U00000000`)
	}
	if len(s) < n || n > 2 && strings.Trim(s[2:n], hexDigits) != "" {
		return 0
	}
	return n
}

// isDigits reports whether s consists of digits of the set, with single underscores between them.
func isDigits(s, set string) bool {
	for part := range strings.SplitSeq(s, "_") {
		if part == "" || strings.Trim(part, set) != "" {
			return false
		}
	}
	return true
}

// isDecimal reports whether s is a decimal integer, perhaps with a sign, without leading zeros.
func isDecimal(s string) bool {
	s = withoutSign(s)
	return isDigits(s, decimalDigits) && (s == "0" || s[0] != '0')
}

// isInteger reports whether s is written as an integer.
func isInteger(s string) bool {
	switch s[:min(2, len(s))] {
	case "0x":
		return isDigits(s[2:], hexDigits)
	case "0o":
		return isDigits(s[2:], octalDigits)
	case "0b":
		return isDigits(s[2:], binaryDigits)
	}
	return isDecimal(s)
}

// isFloat reports whether s is written as a number with a fraction, an exponent or both.
func isFloat(s string) bool {
	if i := strings.IndexAny(s, "eE"); i >= 0 {
		if !isDigits(withoutSign(s[i+1:]), decimalDigits) {
			return false
		}
		s = s[:i]
	}
	whole, fraction, pointed := strings.Cut(s, ".")
	return isDecimal(whole) && (!pointed || isDigits(fraction, decimalDigits))
}

// isDateOrTime reports whether s begins like a date or a time.
func isDateOrTime(s string) bool {
	return len(s) > 6 && s[4] == '-' && isDigits(s[:4], decimalDigits) && isDigits(s[5:7], decimalDigits) ||
		len(s) > 2 && s[2] == ':' && isDigits(s[:2], decimalDigits)
}

// withoutSign cuts one sign off.
func withoutSign(s string) string {
	if s != "" && strings.Contains("+-", s[:1]) {
		return s[1:]
	}
	return s
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
