package main

import (
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"strconv"
)

// mutant is one change of a file.
type mutant struct {
	file   string
	source []byte // with the change
	what   string // it is, for people
	lot    uint64 // by which mutants are drawn
}

// opposite are the operators that are easily mistaken for each other.
var opposite = map[token.Token]token.Token{
	token.LSS: token.LEQ, token.LEQ: token.LSS, token.GTR: token.GEQ, token.GEQ: token.GTR,
	token.EQL: token.NEQ, token.NEQ: token.EQL, token.LAND: token.LOR, token.LOR: token.LAND,
	token.ADD: token.SUB, token.SUB: token.ADD, token.MUL: token.QUO, token.QUO: token.MUL,
	token.ADD_ASSIGN: token.SUB_ASSIGN, token.SUB_ASSIGN: token.ADD_ASSIGN,
	token.INC: token.DEC, token.DEC: token.INC,
}

// mutantsOf returns the changes that are made in a file of the program, sorted as if drawn by lot, though always the same: by a hash
// of what they are.
func mutantsOf(name string) (all []mutant, err error) {
	path, err := filepath.Abs(filepath.Join("..", name))
	if err != nil {
		return nil, err
	}
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, path, source, 0)
	if err != nil {
		return nil, err
	}
	add := func(kind string, from, to token.Pos, now string) {
		start, end := fset.Position(from), fset.Position(to)
		line := bytes.TrimSpace(bytes.Split(source, []byte("\n"))[start.Line-1])
		lot := fnv.New64a()
		fmt.Fprint(lot, "/", name, string(line), kind, now)
		all = append(all, mutant{
			file: path, source: slices.Concat(source[:start.Offset], []byte(now), source[end.Offset:]), lot: lot.Sum64(),
			what: fmt.Sprintf("%s:%d: %s: %.80s", name, start.Line, kind, line),
		})
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
			from, to := fset.Position(n.Cond.Pos()).Offset, fset.Position(n.Cond.End()).Offset
			add("condition negated", n.Cond.Pos(), n.Cond.End(), fmt.Sprintf("!(%s)", source[from:to]))
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
	slices.SortStableFunc(all, func(a, b mutant) int { return cmp.Compare(a.lot, b.lot) })
	return all, nil
}
