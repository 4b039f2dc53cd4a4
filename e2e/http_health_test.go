package e2e

import (
	"net/http"
	"regexp"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
)

// TestHealth checks /health byte for byte, and what it counts.
func TestHealth(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/drop":
			panic(http.ErrAbortHandler)
		case "/429":
			w.WriteHeader(429)
		}
	}))
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	check := func(served, errors string) {
		t.Helper()
		status, body, err := p.Health()
		if err != nil || status != 200 {
			t.Fatalf("status %d, %v", status, err)
		}
		got := regexp.MustCompile(`"uptime_seconds":\d+,`).ReplaceAllString(strings.TrimSuffix(string(body), "\n"), `"uptime_seconds":N,`)
		want := `{"status":"healthy","tailnet":"disabled","uptime_seconds":N,"requests_served":` + served + `,"errors_total":` + errors + `}`
		if got != want {
			t.Errorf("/health says %s, want %s", got, want)
		}
	}
	check("0", "0")
	c := client(t)
	for _, path := range []string{"/ok", "/429", "/drop", "/livez", "/metrics"} { // the last two are not proxied
		roundTrip(t, c, newRequest(t, "GET", p.URL()+path, nil))
	}
	completed(t, p, 3)
	check("3", "1")
	roundTrip(t, c, newRequest(t, "POST", p.URL()+"/large", zeros(1<<20+1)))
	completed(t, p, 4)
	check("4", "2")
}
