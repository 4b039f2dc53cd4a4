//go:build qemu

// Package arm64 runs the program for arm64, under qemu's user mode emulation.
package arm64

import (
	"net/http"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestARM64(t *testing.T) {
	t.Setenv("GOARCH", "arm64")
	binary := proxytest.Must(proxytest.BuildWith(t.TempDir(), nil, "-ldflags", "-s -w"))(t)
	emulated := func(args ...string) proxytest.Options { // by Debian's package qemu-user-static
		return proxytest.Options{Binary: binary, Args: args, Within: []string{"qemu-aarch64-static"}}
	}
	says := map[string]string{"-version": "anthropic-oauth-proxy ", "-check-config": `upstream_url = "https://api.anthropic.com"`}
	for flag, want := range says {
		if ran := proxytest.Exec(t, emulated(flag)); ran.Code != 0 || !strings.Contains(ran.Stdout, want) {
			t.Errorf("%s: %+v; want %q in it", flag, ran, want)
		}
	}

	s := proxytest.NewScene(t)
	api := s.API(fakeanthropic.HTTP2, nil)
	o := emulated(proxytest.Serve(api.URL)...)
	o.Env = api.Env()
	s.Launch(o)
	for _, body := range []string{proxytest.Message, proxytest.Stream} {
		a := s.Send("POST", "/v1/messages", strings.NewReader(body))
		if a.Err != nil || a.StatusCode != http.StatusOK || !strings.Contains(a.Text, "end_turn") {
			t.Errorf("%s: %s, %v, %s", body, a.Status, a.Err, a.Text)
		}
		s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
	}
}
