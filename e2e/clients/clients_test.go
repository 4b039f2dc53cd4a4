//go:build clients

// Package clients runs the examples of docs/clients.md, as they stand there, with the real clients:
//
//	go -C e2e test -count=1 -tags clients ./clients
//
// It needs Python with venv, Node.js with npm, and curl; the packages, of the versions in requirements.txt and package.json, it
// installs below the user's cache folder.
package clients

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

// base is what the document calls the proxy.
const base = "http://anthropic-oauth-proxy:8080"

// token opens nothing.
const token = "sk-ant-oat01-only-a-test"

// block is an example that is to be run.
var block = regexp.MustCompile("(?m)^## (.*)$|<!-- run -->\n```(\\w+)\n((?s:.*?))```\n")

func TestExamples(t *testing.T) {
	doc, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
	home := install(t)
	up, err := fakeanthropic.Start(fakeanthropic.HTTP2, fakeanthropic.API{})
	if err != nil {
		t.Fatal(err)
	}
	defer up.Close()
	p := proxytest.Local(t, up.URL, "", up.Env()...)
	heading, run := "", 0
	for _, found := range block.FindAllStringSubmatch(string(doc), -1) {
		if found[1] != "" {
			heading = found[1]
			continue
		}
		run++
		language, text := found[2], strings.ReplaceAll(found[3], base, p.URL())
		t.Run(heading+"/"+language, func(t *testing.T) {
			before := len(up.Requests())
			var cmd *exec.Cmd
			switch language {
			case "bash":
				cmd = exec.CommandContext(t.Context(), "bash", "-ec", text)
			case "python":
				cmd = exec.CommandContext(t.Context(), filepath.Join(home, "venv/bin/python"), "-c", text)
			case "javascript":
				cmd = exec.CommandContext(t.Context(), "node", "--input-type=module", "-e", text)
			default:
				t.Fatalf("nobody can run %s here", language)
			}
			cmd.Dir = home
			cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"), "ANTHROPIC_AUTH_TOKEN=" + token, "NO_PROXY=*",
				"LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS=True"} // or else it asks the network
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), "word4") {
				t.Fatalf("%v: %s\n%s", err, out, p.Stdout())
			}
			for _, r := range up.Requests()[before:] {
				betas := strings.Join(r.Header.Values("Anthropic-Beta"), ",")
				if r.RequestURI != "/v1/messages" || r.Header.Get("Authorization") != "Bearer "+token || r.Header["X-Api-Key"] != nil ||
					strings.Count(betas, fakeanthropic.OAuthBeta) != 1 {
					t.Errorf("the API got %s, %v", r.RequestURI, r.Header)
				}
			}
			if n := len(up.Requests()) - before; n != 1 {
				t.Errorf("the API got %d requests", n)
			}
		})
	}
	if run < 6 {
		t.Errorf("docs/clients.md has %d examples to run, fewer than ever: is it read rightly?", run)
	}
}

// install returns the folder that has the packages.
func install(t *testing.T) string {
	t.Helper()
	sum := sha256.New()
	for _, name := range []string{"requirements.txt", "package.json"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		sum.Write(text)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	home := filepath.Join(cache, "anthropic-oauth-proxy", fmt.Sprintf("clients-%x", sum.Sum(nil)[:8]))
	done := filepath.Join(home, "done")
	if _, err := os.Stat(done); err == nil {
		return home
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{
		{"rm", "-rf", home},
		{"mkdir", "-p", home},
		{"cp", filepath.Join(here, "package.json"), home},
		{"python3", "-m", "venv", filepath.Join(home, "venv")},
		{filepath.Join(home, "venv/bin/pip"), "-q", "install", "-r", filepath.Join(here, "requirements.txt")},
		{"npm", "--prefix", home, "install", "--silent", "--no-audit", "--no-fund"},
		{"touch", done},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", slices.Concat(command), err, out)
		}
	}
	return home
}
