package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// mutant is one change of a file.
type mutant struct {
	file       string
	before     []byte // the whole file
	start, end int    // what is replaced
	now        string
	kind       string
}

func (m mutant) source() []byte {
	return slices.Concat(m.before[:m.start], []byte(m.now), m.before[m.end:])
}

// number is that of the line in which the change begins.
func (m mutant) number() int { return bytes.Count(m.before[:m.start], []byte("\n")) + 1 }

// line is the text of that line.
func (m mutant) line() string {
	line := m.before[bytes.LastIndexByte(m.before[:m.start], '\n')+1:]
	line, _, _ = bytes.Cut(line, []byte("\n"))
	return string(bytes.TrimSpace(line))
}

func (m mutant) String() string {
	return fmt.Sprintf("%s:%d: %s: %.80s", filepath.Base(m.file), m.number(), m.kind, m.line())
}

// opposite are the operators that are easily mistaken for each other.
var opposite = map[token.Token]token.Token{
	token.LSS: token.LEQ, token.LEQ: token.LSS, token.GTR: token.GEQ, token.GEQ: token.GTR,
	token.EQL: token.NEQ, token.NEQ: token.EQL, token.LAND: token.LOR, token.LOR: token.LAND,
	token.ADD: token.SUB, token.SUB: token.ADD, token.MUL: token.QUO, token.QUO: token.MUL,
	token.ADD_ASSIGN: token.SUB_ASSIGN, token.SUB_ASSIGN: token.ADD_ASSIGN,
	token.INC: token.DEC, token.DEC: token.INC,
}

// mutantsOf returns the changes that are made in a file, in the order of [order].
func mutantsOf(path string) ([]mutant, error) {
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, source, 0)
	if err != nil {
		return nil, err
	}
	var all []mutant
	add := func(kind string, from, to token.Pos, now string) {
		all = append(all, mutant{path, source, fset.Position(from).Offset, fset.Position(to).Offset, now, kind})
	}
	operator := func(at token.Pos, op token.Token) {
		if other, ok := opposite[op]; ok {
			add(op.String()+" → "+other.String(), at, at+token.Pos(len(op.String())), other.String())
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.BinaryExpr:
			operator(n.OpPos, n.Op)
		case *ast.IncDecStmt:
			operator(n.TokPos, n.Tok)
		case *ast.AssignStmt:
			operator(n.TokPos, n.Tok)
			if n.Tok == token.ASSIGN {
				add("assignment left out", n.Pos(), n.End(), "")
			}
		case *ast.IfStmt:
			add("condition negated", n.Cond.Pos(), n.Cond.End(), "!("+string(source[fset.Position(n.Cond.Pos()).Offset:fset.Position(n.Cond.End()).Offset])+")")
		case *ast.ExprStmt:
			add("call left out", n.Pos(), n.End(), "")
		case *ast.DeferStmt:
			add("defer left out", n.Pos(), n.End(), "")
		case *ast.CaseClause:
			if len(n.Body) > 0 {
				add("case left out", n.Body[0].Pos(), n.Body[len(n.Body)-1].End(), "")
			}
		case *ast.Ident:
			if now, ok := map[string]string{"true": "false", "false": "true"}[n.Name]; ok {
				add(n.Name+" → "+now, n.Pos(), n.End(), now)
			}
		case *ast.BasicLit:
			if value, err := strconv.ParseInt(n.Value, 0, 64); err == nil && n.Kind == token.INT {
				add("number", n.Pos(), n.End(), strconv.FormatInt(value+1, 10))
			}
		}
		return true
	})
	order(all)
	return all, nil
}
