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
	"net/http"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) { os.Exit(proxytest.Main(m)) }

const (
	base  = "http://anthropic-oauth-proxy:8080" // what the document calls the proxy
	token = "sk-ant-oat01-only-a-test"          // opens nothing
)

// states are the clients that say how long they wait, by heading and language. The Python example streams.
var states = []string{"Anthropic's SDKs/python", "Anthropic's SDKs/javascript", "LangChain/python"}

// TestExamples runs each example twice: in front of an API that answers at once, and of one that takes longer than
// timeout_secs, which only clients that state their patience get an answer from.
func TestExamples(t *testing.T) {
	home := install(t)
	for name, text := range read(t) {
		t.Run(name, func(t *testing.T) {
			requests := run(t, home, name, text, fakeanthropic.API{}, "", true)
			if len(requests) != 1 {
				t.Fatalf("the API got %d requests", len(requests))
			}
			r := requests[0]
			betas := strings.Join(r.Header.Values("Anthropic-Beta"), ",")
			if r.RequestURI != "/v1/messages" || r.Header.Get("Authorization") != "Bearer "+token || r.Header["X-Api-Key"] != nil ||
				strings.Count(betas, fakeanthropic.OAuthBeta) != 1 {
				t.Errorf("the API got %s, %v", r.RequestURI, r.Header)
			}
		})
		t.Run(name+", late", func(t *testing.T) {
			late := fakeanthropic.Slow(1500*time.Millisecond, fakeanthropic.API{})
			run(t, home, name, text, late, "[proxy]\ntimeout_secs = 1\ntimeout_retries = 0\n", slices.Contains(states, name))
		})
	}
}

// read returns the examples of the document, by heading and language.
func read(t *testing.T) map[string]string {
	t.Helper()
	doc := proxytest.Must(os.ReadFile("../../docs/clients.md"))(t)
	block := regexp.MustCompile("(?m)^## (.*)$|<!-- run -->\n```(\\w+)\n((?s:.*?))```\n")
	heading, examples := "", map[string]string{}
	for _, found := range block.FindAllStringSubmatch(string(doc), -1) {
		if found[1] != "" {
			heading = found[1]
		} else {
			examples[heading+"/"+found[2]] = found[3]
		}
	}
	if len(examples) < 6 {
		t.Fatalf("docs/clients.md has %d examples to run, fewer than ever: is it read rightly?", len(examples))
	}
	return examples
}

// run runs an example through a proxy in front of an API, sees whether it gets the answer, and returns what the API got.
func run(t *testing.T, home, name, text string, api http.Handler, config string, answered bool) []fakeanthropic.Request {
	t.Helper()
	up := proxytest.NewScene(t).API(fakeanthropic.HTTP2, api)
	p := proxytest.Local(t, up.URL, config, up.Env()...)
	interpreters := map[string][]string{
		"bash":       {"bash", "-ec"},
		"python":     {filepath.Join(home, "venv/bin/python"), "-c"},
		"javascript": {"node", "--input-type=module", "-e"},
	}
	interpreter := interpreters[path.Base(name)]
	if interpreter == nil {
		t.Fatalf("nobody can run %s here", name)
	}
	cmd := exec.CommandContext(t.Context(), interpreter[0], append(interpreter[1:], strings.ReplaceAll(text, base, p.URL()))...)
	cmd.Dir = home
	cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"), "ANTHROPIC_AUTH_TOKEN=" + token, "NO_PROXY=*",
		"LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS=True"} // or else it asks the network
	out, err := cmd.CombinedOutput()
	if got := err == nil && strings.Contains(string(out), "word4"); got != answered {
		t.Errorf("answered: %t, want %t: %v: %s", got, answered, err, out)
	}
	return up.Requests()
}

// install returns the folder that has the packages, which is named after their versions.
func install(t *testing.T) string {
	t.Helper()
	versions := slices.Concat(proxytest.Must(os.ReadFile("requirements.txt"))(t), proxytest.Must(os.ReadFile("package.json"))(t))
	home := filepath.Join(proxytest.Must(os.UserCacheDir())(t), "anthropic-oauth-proxy", fmt.Sprintf("clients-%x", sha256.Sum256(versions))[:24])
	const commands = `
		[ ! -e "$1/done" ] || exit 0
		rm -rf "$1"
		mkdir -p "$1"
		cp package.json "$1"
		python3 -m venv "$1/venv"
		"$1/venv/bin/pip" -q install -r requirements.txt
		npm --prefix "$1" install --silent --no-audit --no-fund
		touch "$1/done"`
	if out, err := exec.Command("bash", "-exc", commands, "install", home).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return home
}
