package e2e

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"

	"github.com/yuin/goldmark/ast"
	table "github.com/yuin/goldmark/extension/ast"
)

var update = flag.Bool("update", false, "write docs/promises.md anew; what it says of sentences that are still there stays")

// promisesFile says of each sentence of the promising documents which tests hold it.
const promisesFile = "../docs/promises.md"

// promising are the documents that promise something, but for SECURITY.md, which names its tests itself. The first two
// are the contract, and what settles its details: they lie beside the checkout where this is developed. Elsewhere
// their rows are taken as they stand.
var promising = []string{"../shared/runbook.md", "../shared/spec.md", "README.md", "RUNBOOK.md"}

const promisesHead = `# Promises

What the documents say, sentence by sentence, and what fails if it is not so. A dash: it promises nothing, or nothing that a machine can check.
Made by ` + "`go -C e2e test -run TestPromises . -update`" + `, which takes new sentences in, for whoever wrote them to fill in the last column, and leaves out what has gone.
Besides the names of tests, "fault" is a row of e2e/faults, "cluster" a step of e2e/cluster, "ci" a stage of ` + "`.ci/run`" + `.
`

// promise is a sentence, or the beginning of a long one, and the names of the tests that hold it.
type promise struct{ sentence, shownBy string }

// TestPromises: each sentence has a test that exists, or says that it needs none.
func TestPromises(t *testing.T) {
	old, err := os.ReadFile(promisesFile)
	if err != nil && !*update {
		t.Fatal(err)
	}
	was, known := readPromises(string(old)), evidence(t)
	now := promisesHead
	for _, document := range promising {
		promises := was[document]
		if source, err := os.ReadFile(filepath.Join("..", document)); err == nil {
			promises = promisesOf(source, promises)
		} else if !strings.HasPrefix(document, "..") {
			t.Fatal(err)
		}
		now += fmt.Sprintf("\n## %s\n\n| sentence | shown by |\n|---|---|\n", document)
		for _, p := range promises {
			now += fmt.Sprintf("| %s | %s |\n", p.sentence, p.shownBy)
			if p.shownBy == "" {
				t.Errorf("%s: nothing shows: %s", document, p.sentence)
			}
			for _, name := range evidenceForm.FindAllString(p.shownBy, -1) {
				if !known[name] {
					t.Errorf("%s: there is no %s, which is to show: %s", document, name, p.sentence)
				}
			}
		}
	}
	switch {
	case *update:
		err = os.WriteFile(promisesFile, []byte(now), 0o644)
	case now != string(old):
		err = fmt.Errorf("%s is not that of the documents: go -C e2e test -run TestPromises . -update, then fill in the new rows", promisesFile)
	}
	if err != nil {
		t.Error(err)
	}
}

// readPromises reads the tables of promisesFile by document.
func readPromises(page string) map[string][]promise {
	all, document := map[string][]promise{}, ""
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		if heading, ok := strings.CutPrefix(line, "## "); ok {
			document = heading
		}
		row, ok := strings.CutPrefix(line, "| ")
		if sentence, shownBy, found := strings.Cut(strings.TrimSuffix(row, "|"), " | "); ok && found && sentence != "sentence" {
			all[document] = append(all[document], promise{sentence, strings.TrimSpace(shownBy)})
		}
	}
	return all
}

// promisesOf takes a document apart, and keeps what was said of its sentences.
func promisesOf(source []byte, was []promise) (all []promise) {
	said := map[string]string{}
	for _, p := range was {
		said[p.sentence] = p.shownBy
	}
	add := func(sentence string) {
		const long = 140
		sentence = strings.ReplaceAll(strings.Join(strings.Fields(sentence), " "), "|", "¦")
		if short := []rune(sentence); len(short) > long {
			sentence = string(short[:long]) + "…"
		}
		if sentence != "" {
			all = append(all, promise{sentence, said[sentence]})
		}
	}
	generated := false
	ast.Walk(parse(source).Node, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		heading, ok := n.(*ast.Heading)
		if entering && ok {
			generated = plain(heading, source) == "What it withstands" // from the faults: see TestRunbook
		}
		switch {
		case !entering || generated:
		case n.Kind() == table.KindTableRow:
			var cells []string
			for cell := n.FirstChild(); cell != nil; cell = cell.NextSibling() {
				cells = append(cells, plain(cell, source))
			}
			add(strings.Join(cells, " ¦ "))
			return ast.WalkSkipChildren, nil
		case n.Kind() == ast.KindFencedCodeBlock:
			for line := range strings.Lines(string(n.Lines().Value(source))) {
				if strings.Contains(line, `"`) || strings.Contains(line, " = ") { // neither a drawing nor a command: see TestShellBlocks
					add(line)
				}
			}
		case n.Kind() == ast.KindParagraph, n.Kind() == ast.KindTextBlock:
			for _, sentence := range strings.SplitAfter(sentenceEnd.ReplaceAllString(plain(n, source), "$1\x00$2"), "\x00") {
				add(strings.TrimSuffix(sentence, "\x00"))
			}
			return ast.WalkSkipChildren, nil
		}
		return ast.WalkContinue, nil
	})
	return all
}

// sentenceEnd is followed by a capital letter, or by code.
var sentenceEnd = regexp.MustCompile("([.!?)]) +([A-Z`(/])")

// evidenceForm is what the last column names.
var evidenceForm = regexp.MustCompile(`\b(Test|Fuzz)[A-Z]\w*|\b(fault|cluster) "[^"]+"|\bci \w+`)

// evidence returns all that may be named.
func evidence(t *testing.T) map[string]bool {
	all := map[string]bool{}
	for kind, names := range map[string][]string{"fault": namesIn(t, "faults", "Faults$"), "cluster": namesIn(t, "cluster", "^criteria$")} {
		for _, name := range names {
			all[kind+` "`+name+`"`] = true
		}
	}
	for _, pattern := range []string{"../*_test.go", "*_test.go", "*/*_test.go"} {
		paths := proxytest.Must(filepath.Glob(pattern))(t)
		for _, path := range paths {
			for _, name := range functions(t, path) {
				all[name] = true
			}
		}
	}
	script := proxytest.Must(os.ReadFile("../.ci/run"))(t)
	for _, stage := range regexp.MustCompile(`(?m)^stage_(\w+)`).FindAllStringSubmatch(string(script), -1) {
		all["ci "+stage[1]] = true
	}
	return all
}
