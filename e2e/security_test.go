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

// TestSecurityClaims shows that what SECURITY.md calls on as evidence exists: each
// test in the file that it names, each fault and group of e2e/faults, each step
// of e2e/cluster. A row of a table without evidence must say "not tested".
func TestSecurityClaims(t *testing.T) {
	const path = "../SECURITY.md"
	doc, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	known := map[string][]string{
		"fault":               namesIn(t, "faults", "Faults$"),
		"group of faults":     namesIn(t, "faults", "^groups$"),
		"step of e2e/cluster": namesIn(t, "cluster", "^criteria$"),
	}
	files := map[string]string{} // of the tests mentioned so far
	found := map[string]int{}
	for _, block := range blocks(string(doc)) {
		mentions := mentionsIn(block)
		if strings.HasPrefix(block, "|") && len(mentions) == 0 && !strings.Contains(block, "not tested") {
			t.Errorf("%s has a claim without evidence: %s", path, block)
		}
		for _, m := range mentions {
			found[m.kind]++
			if m.kind != "test" {
				if !slices.Contains(known[m.kind], m.name) {
					t.Errorf("%s names the %s %q, which does not exist", path, m.kind, m.name)
				}
				continue
			}
			file := m.file
			if file == "above" {
				file = files[m.name]
			}
			if file == "" || !slices.Contains(functions(t, filepath.Join("..", file)), m.name) {
				t.Errorf("%s names the test %s, which does not exist in %q", path, m.name, file)
			}
			files[m.name] = file
		}
	}
	for kind, least := range map[string]int{"test": 30, "fault": 15, "group of faults": 1, "step of e2e/cluster": 1} {
		if found[kind] < least {
			t.Errorf("%s has %d mentions of a %s, which are fewer than ever: is it read rightly?", path, found[kind], kind)
		}
	}
}

// blocks returns the rows of the tables, without their heads, and the text
// between tables and empty lines, each on one line.
func blocks(doc string) (all []string) {
	var text []string
	flush := func() {
		all, text = append(all, strings.Join(text, " ")), nil
	}
	lines := strings.Split(doc, "\n")
	for i, line := range lines {
		switch {
		case line == "", strings.HasPrefix(line, "|"):
			flush()
			isRule := func(i int) bool { return i < len(lines) && strings.HasPrefix(lines[i], "|---") }
			if line != "" && !isRule(i) && !isRule(i+1) {
				all = append(all, line)
			}
		default:
			text = append(text, line)
		}
	}
	flush()
	return all
}

// mention is one piece of evidence.
type mention struct {
	kind string // test, fault, group of faults, step of e2e/cluster
	name string
	file string // of a test: its path, "above" if an earlier mention has it, or "" if there is none
}

var (
	mentionForms = regexp.MustCompile(`\b((?:Test|Fuzz)[A-Z]\w*)|` + // 1: a test
		`\bin ([\w/]+_test\.go)|(as above)|` + // 2, 3: the file of the tests before
		`\bfaults of the group "([^"]*)"|` + // 4
		`\bfaults? ("[^"]*"(?:, "[^"]*")*)|` + // 5: one or more faults
		`\be2e/cluster, "([^"]*)"`) // 6
	quoted = regexp.MustCompile(`"([^"]*)"`)
)

// mentionsIn returns what a block calls on.
func mentionsIn(block string) (all []mention) {
	for _, m := range mentionForms.FindAllStringSubmatch(block, -1) {
		test, file, above, group, faults, step := m[1], m[2], m[3], m[4], m[5], m[6]
		if above != "" {
			file = "above"
		}
		switch {
		case test != "":
			all = append(all, mention{kind: "test", name: test})
		case file != "":
			for i := len(all) - 1; i >= 0 && all[i].kind == "test" && all[i].file == ""; i-- {
				all[i].file = file
			}
		case group != "":
			all = append(all, mention{kind: "group of faults", name: group})
		case faults != "":
			for _, name := range quoted.FindAllStringSubmatch(faults, -1) {
				all = append(all, mention{kind: "fault", name: name[1]})
			}
		case step != "":
			all = append(all, mention{kind: "step of e2e/cluster", name: step})
		}
	}
	return all
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
