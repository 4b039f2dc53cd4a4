package main

import (
	"bytes"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestCheck runs the doctor against real sockets on loopback: it stops at the first step that fails.
func TestCheck(t *testing.T) {
	ok := httptest.NewServer(http.NotFoundHandler())
	defer ok.Close()
	secure := httptest.NewUnstartedServer(http.NotFoundHandler())
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // of a client that does not trust it
	secure.StartTLS()
	defer secure.Close()
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	garbled := httptest.NewServer(says("SSH-2.0-x\r\n"))
	defer garbled.Close()
	missing := filepath.Join(t.TempDir(), "missing.sock")
	for name, row := range map[string]struct {
		overrides overrides
		want      string // lines without their times, with addresses as ADDR
	}{
		"all well": {overrides: overrides{local: true, upstream: ok.URL}, want: "config defaults\ntailscaled skipped: -local has no tailnet\ndns 127.0.0.1 is 127.0.0.1\n" +
			"tcp connected to ADDR\ntls skipped: the upstream is plain http\nhttp http://ADDR answered 404\n"},
		"no daemon":         {overrides: overrides{upstream: ok.URL, socket: missing}, want: "config defaults\ntailscaled FAILED"},
		"nobody listens":    {overrides: overrides{local: true, upstream: closed.URL}, want: "config defaults\ntailscaled skipped: -local has no tailnet\ndns 127.0.0.1 is 127.0.0.1\ntcp FAILED"},
		"unknown authority": {overrides: overrides{local: true, upstream: secure.URL}, want: "config defaults\ntailscaled skipped: -local has no tailnet\ndns 127.0.0.1 is 127.0.0.1\ntcp connected to ADDR\ntls FAILED"},
		"no HTTP": {overrides: overrides{local: true, upstream: garbled.URL},
			want: "config defaults\ntailscaled skipped: -local has no tailnet\ndns 127.0.0.1 is 127.0.0.1\ntcp connected to ADDR\ntls skipped: the upstream is plain http\nhttp FAILED"},
	} {
		var out bytes.Buffer
		err := check(t.Context(), row.overrides, &out)
		text := regexp.MustCompile(`(?m)^(\w+) +[0-9.]+ ms  `).ReplaceAllString(out.String(), "$1 ")
		text = regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllString(text, "ADDR")
		text = regexp.MustCompile(`(?m)^config defaults, there is no .*$`).ReplaceAllString(text, "config defaults")
		if i := strings.Index(text, "FAILED"); i >= 0 {
			holds(t, strings.Contains(text[i:], "; ") && strings.Count(text[i:], "\n") == 1, "%s: the failure has no hint, or does not end the check:\n%s", name, text)
			text = text[:i+len("FAILED")]
		}
		equal(t, name, text, row.want)
		equal(t, name+": it fails", exitCode(err) == 1, strings.HasSuffix(row.want, "FAILED"))
	}
}

func TestDoctorTarget(t *testing.T) {
	for _, row := range []struct{ upstream, via, want string }{
		{upstream: "https://h", want: "h:443"}, {upstream: "http://h", want: "h:80"}, {upstream: "https://h:8443", want: "h:8443"}, {upstream: "https://[::1]/x", want: "[::1]:443"},
		{upstream: "https://h", via: "http://p:3128", want: "p:3128"}, {upstream: "https://h", via: "socks5://p", want: "p:1080"}, {upstream: "https://h", via: "socks5h://p", want: "p:1080"},
	} {
		d := &doctor{cfg: testConfig(t, "", overrides{upstream: row.upstream})}
		if row.via != "" {
			d.via, _ = url.Parse(row.via)
		}
		equal(t, row.upstream+" by "+row.via, net.JoinHostPort(d.firstHop()), row.want)
	}
}
