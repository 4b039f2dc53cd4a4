package e2e

import (
	"bytes"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"anthropic-oauth-proxy/e2e/proxytest"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// A page is a Markdown file of the project.
type page struct {
	source []byte
	ast.Node
}

func parse(source []byte) page {
	return page{source, goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser().Parse(text.NewReader(source))}
}

// pages parses all that git tracks.
func pages(t *testing.T) map[string]page {
	t.Helper()
	all := map[string]page{}
	for _, name := range strings.Fields(git(t, "..", "ls-files", "*.md")) {
		all[name] = parse(proxytest.Must(os.ReadFile(filepath.Join("..", name)))(t))
	}
	return all
}

// nodes returns a page's nodes of one kind.
func nodes[T ast.Node](p page) (all []T) {
	ast.Walk(p.Node, func(n ast.Node, entering bool) (ast.WalkStatus, error) {
		if node, ok := n.(T); ok && entering {
			all = append(all, node)
		}
		return ast.WalkContinue, nil
	})
	return all
}

// plain is the text of a heading, a cell or a paragraph.
func plain(n ast.Node, source []byte) (s string) {
	for c := n.FirstChild(); c != nil; c = c.NextSibling() {
		if leaf, ok := c.(*ast.Text); ok {
			s += string(leaf.Segment.Value(source))
			if leaf.SoftLineBreak() {
				s += " "
			}
		} else {
			s += plain(c, source)
		}
	}
	return s
}

// anchor makes a heading's name in links: letters, digits, - and _, with hyphens for blanks.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case unicode.IsLetter(r) || unicode.IsDigit(r) || r == '-' || r == '_':
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}

// TestLinks: those between the project's files lead somewhere, and to every page.
func TestLinks(t *testing.T) {
	all := pages(t)
	anchors := map[string][]string{}
	for name, p := range all {
		for _, heading := range nodes[*ast.Heading](p) {
			anchors[name] = append(anchors[name], anchor(plain(heading, p.source)))
		}
	}
	linked := map[string]bool{"README.md": true}
	follow := func(name, link string) {
		u := proxytest.Must(url.Parse(link))(t)
		if u.Scheme != "" {
			return
		}
		target := name
		if u.Path != "" {
			target = path.Join(path.Dir(name), u.Path)
		}
		linked[target] = linked[target] || target != name
		if _, err := os.Stat(filepath.Join("..", target)); err != nil {
			t.Errorf("%s links to %s, which is not there", name, target)
		} else if u.Fragment != "" && !slices.Contains(anchors[target], u.Fragment) {
			t.Errorf("%s links to %s#%s; its headings are %v", name, target, u.Fragment, anchors[target])
		}
	}
	for name, p := range all {
		for _, link := range nodes[*ast.Link](p) {
			follow(name, string(link.Destination))
		}
		for _, image := range nodes[*ast.Image](p) {
			follow(name, string(image.Destination))
		}
	}
	// The alerts do, where users say where RUNBOOK.md can be read.
	alerts := string(proxytest.Must(os.ReadFile("../nix/monitoring.nix"))(t))
	sections := regexp.MustCompile(`section = "(.*)";`).FindAllStringSubmatch(alerts, -1)
	if len(sections) == 0 {
		t.Error("nix/monitoring.nix names no section of RUNBOOK.md")
	}
	for _, section := range sections {
		follow("nix/monitoring.nix", "../RUNBOOK.md#"+section[1])
	}
	for name := range all {
		if !linked[name] {
			t.Errorf("nobody links to %s", name)
		}
	}
}

// TestReadmeIsShort: what a visitor needs first is on a page or two.
func TestReadmeIsShort(t *testing.T) {
	if lines := bytes.Count(pages(t)["README.md"].source, []byte("\n")); lines > 150 {
		t.Errorf("README.md has %d lines, want 150 at most", lines)
	}
}

// TestShellBlocks: each command that a page shows is run somewhere, or can't be here. A new one has to say which.
func TestShellBlocks(t *testing.T) {
	covered := map[string]string{ // the first words of a line, and what runs it
		"go -C e2e run ./demo": ".ci/run readme", "go run -tags": ".ci/run readme", "CGO_ENABLED=0 go build -trimpath -tags": ".ci/run readme", "go test -race ./... &&": ".ci/run test", "git clone https://git.example.com": ".ci/run readme",
		"kubectl": "e2e/cluster, by the same words or with the test's own Secret", "--from-literal=": "e2e/cluster", "--namespace=": "e2e/cluster",
		"nix run .#load": "not here: needs docker, podman, kind or minikube", "nix run .#push": ".ci/nix", "nix build": ".ci/nix", "#": "a comment",
		"curl": "e2e/clients", "-H": "e2e/clients", "-d": "e2e/clients", "ANTHROPIC_BASE_URL=": "not here: Claude Code wants an account",
		".ci/run": ".ci/run", "CGO_ENABLED=0 go build -trimpath -buildvcs=false": ".ci/run release", `-ldflags "-s -w -buildid=`: ".ci/run release",
		"minisign": "not here: wants a key", "cosign": "not here: wants a key", "gh attestation": "not here: wants GitHub",
		"install -": "not here: wants a machine's own systemd", "printf '[proxy]": "e2e/contrib, by another text", "systemctl": "not here: wants systemd", "cd contrib": "a folder",
		"chmod 644 config.toml": "a file", "(umask 077": "not here: wants a key", "docker compose": "e2e/contrib, without an engine",
		"pip install": "e2e/clients", "npm install": "e2e/clients",
	}
	for name, p := range pages(t) {
		for _, block := range nodes[*ast.FencedCodeBlock](p) {
			if !slices.Contains([]string{"bash", "sh", "shell"}, string(block.Language(p.source))) {
				continue
			}
			for line := range strings.Lines(string(block.Lines().Value(p.source))) {
				line = strings.TrimSpace(line)
				known := line == ""
				for prefix := range covered {
					known = known || strings.HasPrefix(line, prefix)
				}
				if !known {
					t.Errorf("%s: nobody runs %q: name what does in TestShellBlocks", name, line)
				}
			}
		}
	}
}
