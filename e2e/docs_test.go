package e2e

import (
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"
)

// page is a Markdown file of the project.
type page struct {
	anchors []string // of its headings, as GitHub and Forgejo make them
	links   []string
}

// readPages parses all that git tracks.
func readPages(t *testing.T) map[string]page {
	t.Helper()
	parser := goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser()
	pages := map[string]page{}
	for _, name := range strings.Fields(git(t, "..", "ls-files", "*.md")) {
		source, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		var p page
		err = ast.Walk(parser.Parse(text.NewReader(source)), func(n ast.Node, entering bool) (ast.WalkStatus, error) {
			switch n := n.(type) {
			case *ast.Heading:
				if entering {
					p.anchors = append(p.anchors, anchor(plain(n, source)))
				}
			case *ast.Link:
				if entering {
					p.links = append(p.links, string(n.Destination))
				}
			case *ast.Image:
				if entering {
					p.links = append(p.links, string(n.Destination))
				}
			}
			return ast.WalkContinue, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		pages[name] = p
	}
	return pages
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
	pages := readPages(t)
	linked := map[string]bool{"README.md": true}
	for name, p := range pages {
		for _, link := range p.links {
			u, err := url.Parse(link)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if u.Scheme != "" {
				continue
			}
			target := name
			if u.Path != "" {
				target = path.Join(path.Dir(name), u.Path)
			}
			linked[target] = linked[target] || target != name
			if _, err := os.Stat(filepath.Join("..", target)); err != nil {
				t.Errorf("%s links to %s, which is not there", name, target)
			} else if u.Fragment != "" && !slices.Contains(pages[target].anchors, u.Fragment) {
				t.Errorf("%s links to %s#%s; its headings are %v", name, target, u.Fragment, pages[target].anchors)
			}
		}
	}
	for name := range pages {
		if !linked[name] {
			t.Errorf("nobody links to %s", name)
		}
	}
}

// TestReadmeIsShort: what a visitor needs first is on a page or two.
func TestReadmeIsShort(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	if lines := strings.Count(string(text), "\n"); lines > 150 {
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
	block := regexp.MustCompile("(?ms)^ *```(?:bash|sh|shell)\n(.*?)^ *```$")
	for _, name := range strings.Fields(git(t, "..", "ls-files", "*.md")) {
		source, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			t.Fatal(err)
		}
		for _, found := range block.FindAllStringSubmatch(string(source), -1) {
			for line := range strings.Lines(found[1]) {
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
