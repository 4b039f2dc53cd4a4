package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

var (
	changelogHeading = regexp.MustCompile(`(?m)^## (.*)$`)
	releaseHeading   = regexp.MustCompile(`^(\d+\.\d+\.\d+(?:-[0-9A-Za-z.-]+)?) - \d{4}-\d\d-\d\d$`)
	versionLine      = regexp.MustCompile(`(?m)^const version = "(.+)"$`)
)

// git runs git in a folder.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=e2e", "-c", "user.email=e2e@localhost"}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	return string(out)
}

// TestVersions: the changelog has what is unreleased on top, then the releases; and each tag's main.go and changelog have its version.
func TestVersions(t *testing.T) {
	check := func(of, changelog, source, tag string) {
		headings := changelogHeading.FindAllStringSubmatch(changelog, -1)
		if len(headings) == 0 || headings[0][1] != "Unreleased" {
			t.Errorf("%s: the changelog does not begin with ## Unreleased", of)
		}
		released := map[string]bool{}
		for _, h := range headings[min(1, len(headings)):] {
			release := releaseHeading.FindStringSubmatch(h[1])
			if release == nil || released[release[1]] {
				t.Errorf("%s: the changelog has the heading %q: want VERSION - DATE, once", of, h[1])
				continue
			}
			released[release[1]] = true
		}
		if version := versionLine.FindStringSubmatch(source)[1]; tag != "" && (tag != "v"+version || !released[version]) {
			t.Errorf("%s: main.go says %s, the changelog has %v", of, version, released)
		}
	}
	changelog := proxytest.Must(os.ReadFile("../CHANGELOG.md"))(t)
	source := proxytest.Must(os.ReadFile("../main.go"))(t)
	check("the tree", string(changelog), string(source), "")
	for _, tag := range strings.Fields(git(t, "..", "tag", "--list", "v[0-9]*")) {
		check(tag, git(t, "..", "show", tag+":CHANGELOG.md"), git(t, "..", "show", tag+":main.go"), tag)
	}
}

// TestReleaseRefused: a release whose tag, version and changelog do not agree is not begun.
func TestReleaseRefused(t *testing.T) {
	clone := filepath.Join(t.TempDir(), "clone")
	git(t, ".", "clone", "--quiet", "..", clone)
	git(t, clone, "tag", "v9.9.9")
	git(t, clone, "tag", "v0.1.0")
	for version, want := range map[string]string{
		"":       "usage: .ci/release VERSION",
		"v0.1.0": "usage: .ci/release VERSION",
		"1.2.3":  "there is no tag v1.2.3",
		"9.9.9":  "main.go of v9.9.9 has another version",
		"0.1.0":  "CHANGELOG.md of v0.1.0 has no heading '## 0.1.0 - DATE'",
	} {
		cmd := exec.Command(filepath.Join(clone, ".ci/release"), version, filepath.Join(t.TempDir(), "out"))
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), want) {
			t.Errorf("release %q: %v, %s; want %q", version, err, out, want)
		}
	}
}
