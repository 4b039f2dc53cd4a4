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

// base is what the document calls the proxy.
const base = "http://anthropic-oauth-proxy:8080"

// token opens nothing.
const token = "sk-ant-oat01-only-a-test"

// states are the clients that say how long they wait, by heading and language. The Python example streams.
var states = []string{"Anthropic's SDKs/python", "Anthropic's SDKs/javascript", "LangChain/python"}

// TestExamples runs each example twice: in front of an API that answers at once, and of one that takes longer than
// timeout_secs, which only clients that state their patience get an answer from.
func TestExamples(t *testing.T) {
	examples := read(t)
	home := install(t)
	for name, text := range examples {
		t.Run(name, func(t *testing.T) {
			up, p := proxied(t, fakeanthropic.API{}, "")
			if out, err := run(t, home, name, text, p); err != nil || !strings.Contains(out, "word4") {
				t.Fatalf("%v: %s\n%s", err, out, p.Stdout())
			}
			if n := len(up.Requests()); n != 1 {
				t.Errorf("the API got %d requests", n)
			}
			for _, r := range up.Requests() {
				betas := strings.Join(r.Header.Values("Anthropic-Beta"), ",")
				if r.RequestURI != "/v1/messages" || r.Header.Get("Authorization") != "Bearer "+token || r.Header["X-Api-Key"] != nil ||
					strings.Count(betas, fakeanthropic.OAuthBeta) != 1 {
					t.Errorf("the API got %s, %v", r.RequestURI, r.Header)
				}
			}
		})
		t.Run(name+", late", func(t *testing.T) {
			up, p := proxied(t, fakeanthropic.Slow(1500*time.Millisecond, fakeanthropic.API{}), "[proxy]\ntimeout_secs = 1\ntimeout_retries = 0\n")
			out, err := run(t, home, name, text, p)
			answered := err == nil && strings.Contains(out, "word4")
			if waited := slices.Contains(states, name); answered != waited {
				t.Errorf("answered: %t, want %t: %v: %s\n%v\n%s", answered, waited, err, out, up.Requests()[0].Header, p.Stdout())
			}
		})
	}
}

// read returns the examples of the document, by heading and language.
func read(t *testing.T) map[string]string {
	t.Helper()
	doc, err := os.ReadFile("../../docs/clients.md")
	if err != nil {
		t.Fatal(err)
	}
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

// proxied starts an API and a proxy in front of it.
func proxied(t *testing.T, api http.Handler, config string) (*fakeanthropic.Server, *proxytest.Proxy) {
	t.Helper()
	up, err := fakeanthropic.Start(fakeanthropic.HTTP2, api)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { up.Close() })
	return up, proxytest.Local(t, up.URL, config, up.Env()...)
}

// run runs an example through the proxy, and returns what it prints.
func run(t *testing.T, home, name, text string, p *proxytest.Proxy) (out string, err error) {
	t.Helper()
	text = strings.ReplaceAll(text, base, p.URL())
	_, language, _ := strings.Cut(name, "/")
	var cmd *exec.Cmd
	switch language {
	case "bash":
		cmd = exec.CommandContext(t.Context(), "bash", "-ec", text)
	case "python":
		cmd = exec.CommandContext(t.Context(), filepath.Join(home, "venv/bin/python"), "-c", text)
	case "javascript":
		cmd = exec.CommandContext(t.Context(), "node", "--input-type=module", "-e", text)
	default:
		t.Fatalf("nobody can run %s here", name)
	}
	cmd.Dir = home
	cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH"), "ANTHROPIC_AUTH_TOKEN=" + token, "NO_PROXY=*",
		"LITELLM_LOCAL_MODEL_COST_MAP=True", "LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS=True"} // or else it asks the network
	printed, err := cmd.CombinedOutput()
	return string(printed), err
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
