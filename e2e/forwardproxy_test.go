package e2e

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// forwardProxy runs a forward proxy that leads every CONNECT to addr. The channel has what it was asked for.
func forwardProxy(s *proxytest.Scene, addr string) (url string, asked <-chan string) {
	targets := make(chan string, 100)
	up := s.Upstream(func(p *proxytest.Peer) {
		req, err := http.ReadRequest(p.R)
		if err != nil {
			return
		}
		targets <- req.Method + " " + req.RequestURI
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			p.Say("HTTP/1.1 502 Bad Gateway\r\n\r\n")
			return
		}
		defer conn.Close()
		p.Say("HTTP/1.1 200 Connection established\r\n\r\n")
		go func() {
			defer p.Close()
			io.Copy(p, conn)
		}()
		io.Copy(conn, p.R)
	})
	s.Mend = nil // it leads on all the same
	return up.URL, targets
}

// TestForwardProxy shows that HTTPS_PROXY is honoured, here with the default
// upstream, whose name is left to the forward proxy, and NO_PROXY too.
func TestForwardProxy(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.API(protocol, answerOK)
		url, asked := forwardProxy(s, strings.TrimPrefix(up.URL, "https://"))
		env := append(up.Env(), "HTTPS_PROXY="+url)
		s.Start("https://api.anthropic.com", "", env...)
		s.Passed(s.Post(), 200, "ok", 1)
		if got := <-asked; got != "CONNECT api.anthropic.com:443" || len(asked) > 0 {
			s.Errorf("the forward proxy was asked for %q, and %d times more", got, len(asked))
		}
		if r := only(s, up); r.Host != "api.anthropic.com" || r.RequestURI != "/v1/messages" {
			s.Errorf("the upstream got %s for host %s", r.RequestURI, r.Host)
		}
		if r := proxytest.Exec(s, proxytest.Options{Args: []string{"-local", "-check"}, Env: env}); r.Code != 0 {
			s.Errorf("-check through the forward proxy: exit code %d\n%s", r.Code, r.Stdout)
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
		s := proxytest.NewScene(t)
		url, asked := forwardProxy(s, "127.0.0.1:1")
		host := strings.Repeat("x", 64) + ".invalid" // fails without a look-up
		s.Start("https://"+host, "", "HTTPS_PROXY="+url, "NO_PROXY=.invalid")
		s.Refused(s.Post(), 502, "connection", -1, "connection:")
		if len(asked) > 0 {
			t.Errorf("the forward proxy was asked for %q", <-asked)
		}
		s.Plain = false
	})
}
