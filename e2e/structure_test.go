package e2e

import (
	"path/filepath"
	"testing"

	"golang.org/x/tools/go/packages"
)

// TestFilesLeanOneWay: the program is one flat package, whose files take the place of packages. As packages they may use one
// another in one direction only: a reader can begin anywhere and never comes back to where they were.
func TestFilesLeanOneWay(t *testing.T) {
	t.Parallel()
	program, err := packages.Load(&packages.Config{
		Dir:  "..",
		Mode: packages.NeedName | packages.NeedFiles | packages.NeedSyntax | packages.NeedTypes | packages.NeedTypesInfo | packages.NeedImports | packages.NeedDeps,
	}, ".")
	if err != nil || len(program) != 1 || packages.PrintErrors(program) > 0 {
		t.Fatalf("loading the program: %v", err)
	}
	p := program[0]
	uses := map[string]map[string]string{} // file, file that it uses: one of the names
	for id, object := range p.TypesInfo.Uses {
		if object.Pkg() != p.Types {
			continue
		}
		from, to := filepath.Base(p.Fset.Position(id.Pos()).Filename), filepath.Base(p.Fset.Position(object.Pos()).Filename)
		if uses[from] == nil {
			uses[from] = map[string]string{}
		}
		if from != to {
			uses[from][to] = object.Name()
		}
	}
	if len(uses) < 10 {
		t.Fatalf("only %d files use one another: this test looks at the wrong thing", len(uses))
	}
	var path []string
	done := map[string]bool{}
	var visit func(file string)
	visit = func(file string) {
		for i, before := range path {
			if before == file {
				t.Errorf("files use one another in a circle: %v, then %s again", path[i:], file)
				return
			}
		}
		if done[file] {
			return
		}
		path = append(path, file)
		for to, name := range uses[file] {
			visit(to)
			if t.Failed() {
				t.Logf("%s uses %s of %s", file, name, to)
			}
		}
		path = path[:len(path)-1]
		done[file] = true
	}
	for file := range uses {
		visit(file)
	}
}
