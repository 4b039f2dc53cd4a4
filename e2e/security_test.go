package e2e

import (
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

var (
	placed = regexp.MustCompile("((?:`\\w+`(?:, | and )?)+) in ([\\w/]+_test\\.go)") // tests, and the file that they are in
	quoted = regexp.MustCompile(`"([^"]*)"`)                                         // a fault, a group of them, or a step of e2e/cluster
)

// TestSecurityClaims shows that what SECURITY.md calls on as evidence exists, and that each row of its tables has some, or says
// "not tested".
func TestSecurityClaims(t *testing.T) {
	doc := proxytest.Must(os.ReadFile("../SECURITY.md"))(t)
	known, mentions := evidence(t), 0
	for _, group := range namesIn(t, "faults", "^groups$") {
		known[`fault "`+group+`"`] = true
	}
	for _, m := range placed.FindAllStringSubmatch(string(doc), -1) {
		declared := functions(t, "../"+m[2])
		for _, name := range evidenceForm.FindAllString(m[1], -1) {
			if !slices.Contains(declared, name) {
				t.Errorf("%s is not in %s", name, m[2])
			}
		}
	}
	for block := range strings.SplitSeq(strings.ReplaceAll(string(doc), "\n|", "\n\n|"), "\n\n") {
		names := evidenceForm.FindAllString(block, -1)
		if strings.Contains(block, "fault") || strings.Contains(block, "e2e/cluster") {
			for _, m := range quoted.FindAllStringSubmatch(block, -1) {
				kind := "cluster"
				if !known[`cluster "`+m[1]+`"`] {
					kind = "fault"
				}
				names = append(names, kind+` "`+m[1]+`"`)
			}
		}
		for _, name := range names {
			if !known[name] {
				t.Errorf("%s does not exist: %s", name, block)
			}
		}
		if strings.HasPrefix(block, "|") && names == nil && !strings.Contains(block, "not tested") && !strings.HasPrefix(block, "|---") && !strings.HasSuffix(block, "| shown by |") {
			t.Errorf("a claim without evidence: %s", block)
		}
		mentions += len(names)
	}
	if mentions < 60 {
		t.Errorf("%d mentions of evidence, which are fewer than ever: are they read rightly?", mentions)
	}
}

// functions returns the names of the functions that a file declares; those of methods begin with that of their type and a dot.
func functions(t *testing.T, path string) (names []string) {
	t.Helper()
	for _, decl := range proxytest.Must(parser.ParseFile(token.NewFileSet(), path, nil, 0))(t).Decls {
		f, ok := decl.(*ast.FuncDecl)
		switch {
		case ok && f.Recv != nil:
			names = append(names, strings.TrimPrefix(types.ExprString(f.Recv.List[0].Type), "*")+"."+f.Name.Name)
		case ok:
			names = append(names, f.Name.Name)
		}
	}
	return names
}

// namesIn returns the names of the elements, which are their first fields, of those tables in a folder's code whose variables are
// called so.
func namesIn(t *testing.T, folder, variables string) (names []string) {
	t.Helper()
	called := regexp.MustCompile(variables)
	for _, path := range proxytest.Must(filepath.Glob(filepath.Join(folder, "*.go")))(t) {
		ast.Inspect(proxytest.Must(parser.ParseFile(token.NewFileSet(), path, nil, 0))(t), func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok || !called.MatchString(spec.Names[0].Name) || spec.Values == nil {
				return true
			}
			for _, element := range spec.Values[0].(*ast.CompositeLit).Elts {
				first := element.(*ast.CompositeLit).Elts[0]
				if pair, ok := first.(*ast.KeyValueExpr); ok {
					first = pair.Value
				}
				names = append(names, proxytest.Must(strconv.Unquote(first.(*ast.BasicLit).Value))(t))
			}
			return true
		})
	}
	if names == nil {
		t.Fatalf("%s has no table in a variable %s", folder, variables)
	}
	return names
}
