package e2e

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// forwardProxy is a forward proxy that leads every CONNECT to addr, and notes
// what it was asked for.
type forwardProxy struct {
	url string

	mu      sync.Mutex
	targets []string
}

func startForwardProxy(t *testing.T, addr string) *forwardProxy {
	f := new(forwardProxy)
	f.url = "http://" + rawUpstream(t, func(_ int, conn net.Conn, r *bufio.Reader) {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		f.mu.Lock()
		f.targets = append(f.targets, req.Method+" "+req.RequestURI)
		f.mu.Unlock()
		up, err := net.Dial("tcp", addr)
		if err != nil || req.Method != http.MethodConnect {
			io.WriteString(conn, "HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		defer up.Close()
		io.WriteString(conn, "HTTP/1.1 200 Connection established\r\n\r\n")
		go func() {
			defer conn.Close()
			io.Copy(conn, up)
		}()
		io.Copy(up, r)
	})
	return f
}

func (f *forwardProxy) asked() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.targets)
}

// TestForwardProxy shows that HTTPS_PROXY is honoured, here with the default
// upstream, whose name is left to the forward proxy, and NO_PROXY too.
func TestForwardProxy(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, nil)
		forward := startForwardProxy(t, strings.TrimPrefix(up.URL, "https://"))
		p := proxytest.Local(t, "https://api.anthropic.com", "", append(up.Env(), "HTTPS_PROXY="+forward.url)...)
		if a := post(t, p, messageBody); a.StatusCode != 200 || !strings.Contains(a.body, "end_turn") {
			t.Errorf("answer %d %s", a.StatusCode, a.body)
		}
		if got := forward.asked(); !slices.Equal(got, []string{"CONNECT api.anthropic.com:443"}) {
			t.Errorf("the forward proxy was asked for %q", got)
		}
		if r := only(t, up); r.Host != "api.anthropic.com" || r.RequestURI != "/v1/messages" {
			t.Errorf("the upstream got %s for host %s", r.RequestURI, r.Host)
		}

		r := proxytest.Exec(t, proxytest.Options{Args: []string{"-local", "-check"}, Env: append(up.Env(), "HTTPS_PROXY="+forward.url)})
		if r.Code != 0 {
			t.Errorf("-check through the forward proxy: exit code %d\n%s", r.Code, r.Stdout)
		}
	})
	t.Run("no URL", func(t *testing.T) {
		t.Parallel()
		for _, value := range []string{"http//proxy:3128", "http:/proxy:3128", "http:proxy:3128", "://proxy", "ftp://proxy", "a proxy", "http://", "http://proxy/path"} {
			for _, name := range []string{"HTTPS_PROXY", "https_proxy"} {
				for _, flag := range []string{"-check", "-check-config", "-local"} {
					r := proxytest.Exec(t, proxytest.Options{Args: []string{flag}, Env: []string{name + "=" + value}})
					if r.Code != 2 || !strings.Contains(r.Stderr+r.Stdout, name+", in the environment, is not the URL") {
						t.Errorf("%s with %s=%s: exit code %d\n%s%s", flag, name, value, r.Code, r.Stdout, r.Stderr)
					}
				}
			}
		}
		for _, value := range []string{"proxy:3128", "http://user:word@proxy:3128/", "socks5://[::1]:1080", "https://proxy"} {
			if r := proxytest.Exec(t, proxytest.Options{Args: []string{"-check-config"}, Env: []string{"HTTPS_PROXY=" + value}}); r.Code != 0 {
				t.Errorf("HTTPS_PROXY=%s: exit code %d\n%s", value, r.Code, r.Stderr)
			}
		}
	})
	t.Run("NO_PROXY", func(t *testing.T) {
		t.Parallel()
		forward := startForwardProxy(t, "127.0.0.1:1")
		host := strings.Repeat("x", 64) + ".invalid" // fails without a look-up
		p := proxytest.Local(t, "https://"+host, "", "HTTPS_PROXY="+forward.url, "NO_PROXY=.invalid")
		checkProxyError(t, post(t, p, messageBody), http.StatusBadGateway, "connection")
		if got := forward.asked(); len(got) > 0 {
			t.Errorf("the forward proxy was asked for %q", got)
		}
	})
}
