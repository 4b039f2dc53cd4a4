package e2e

import (
	"fmt"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestMethods shows that every method but CONNECT is forwarded, and which ones
// have a name in the metrics.
func TestMethods(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, answerOK)
		p := proxyTo(t, up, "")
		for i, tt := range []struct{ method, label string }{
			{"GET", "GET"}, {"HEAD", "HEAD"}, {"POST", "POST"}, {"PUT", "PUT"}, {"PATCH", "PATCH"},
			{"DELETE", "DELETE"}, {"OPTIONS", "OPTIONS"}, {"TRACE", "TRACE"}, {"FROBNICATE", "other"}, {"get", "other"},
		} {
			a := exchange(t, p, tt.method+" /v1/models HTTP/1.1", "Host: proxy", "", "")
			reqs := up.Requests()
			if a.StatusCode != 200 || len(reqs) != i+1 || reqs[i].Method != tt.method {
				t.Errorf("%s: status %d, %d requests at the upstream", tt.method, a.StatusCode, len(reqs))
			}
			completed(t, p, i+1)
			if !proxytest.Scrape(t, p).Has("proxy_requests_total", "status", "200", "method", tt.label) {
				t.Errorf("%s: not counted as method %q", tt.method, tt.label)
			}
		}
	})
}

// headerLines makes n header lines with values of the given length.
func headerLines(n, length int) []string {
	lines := make([]string, n)
	for i := range lines {
		lines[i] = fmt.Sprintf("X-Line-%d: %s", i, strings.Repeat("v", length))
	}
	return lines
}
