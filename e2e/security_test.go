package e2e

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var (
	placed = regexp.MustCompile("((?:`\\w+`(?:, | and )?)+) in ([\\w/]+_test\\.go)") // tests, and the file that they are in
	quoted = regexp.MustCompile(`"([^"]*)"`)                                         // a fault, a group of them, or a step of e2e/cluster
)

// TestSecurityClaims shows that what SECURITY.md calls on as evidence exists, and that each row of its tables has some, or says
// "not tested".
func TestSecurityClaims(t *testing.T) {
	doc, err := os.ReadFile("../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
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
		var names []string
		for _, name := range evidenceForm.FindAllString(block, -1) {
			names = append(names, name)
		}
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

// functions returns the names of the functions that a file declares.
func functions(t *testing.T, path string) (names []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, decl := range file.Decls {
		if f, ok := decl.(*ast.FuncDecl); ok && f.Recv == nil {
			names = append(names, f.Name.Name)
		}
	}
	return names
}

// namesIn returns the names of the elements of those tables in a folder's code
// whose variables are called so.
func namesIn(t *testing.T, folder, variables string) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	called := regexp.MustCompile(variables)
	for _, path := range paths {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			if spec, ok := n.(*ast.ValueSpec); ok && called.MatchString(spec.Names[0].Name) && len(spec.Values) > 0 {
				if table, ok := spec.Values[0].(*ast.CompositeLit); ok {
					names = append(names, elementNames(table)...)
				}
			}
			return true
		})
	}
	if len(names) == 0 {
		t.Fatalf("%s has no table in a variable %s", folder, variables)
	}
	return names
}

// elementNames returns the first field of each element, which is its name.
func elementNames(table *ast.CompositeLit) (names []string) {
	for _, element := range table.Elts {
		fields, ok := element.(*ast.CompositeLit)
		if !ok || len(fields.Elts) == 0 {
			continue
		}
		first := fields.Elts[0]
		if pair, ok := first.(*ast.KeyValueExpr); ok {
			first = pair.Value
		}
		if literal, ok := first.(*ast.BasicLit); ok && literal.Kind == token.STRING {
			if name, err := strconv.Unquote(literal.Value); err == nil {
				names = append(names, name)
			}
		}
	}
	return names
}
