// Package e2e tests the real binary over real sockets against a fake Anthropic API. The tests of this folder need no tailnet:
// they run the proxy with -local. Those on a real tailnet are in ./tailnet.
package e2e

import (
	"flag"
	"io"
	"net/http"
	"os"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) {
	// Most tests wait for a timeout most of the time. -parallel still wins.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	os.Exit(proxytest.Main(m))
}

// eachProtocol plays a scene with an upstream of HTTP/1.1 and one of HTTP/2.
func eachProtocol(t *testing.T, play func(*proxytest.Scene, fakeanthropic.Protocol)) {
	t.Parallel()
	for _, protocol := range []fakeanthropic.Protocol{fakeanthropic.HTTP1, fakeanthropic.HTTP2} {
		t.Run(protocol.String(), func(t *testing.T) {
			t.Parallel()
			play(proxytest.NewScene(t), protocol)
		})
	}
}

// answerOK reads the request and answers 200 with "ok".
var answerOK = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	io.WriteString(w, "ok")
})

// only returns the single request that the upstream got.
func only(t testing.TB, up *fakeanthropic.Server) fakeanthropic.Request {
	t.Helper()
	all := up.Requests()
	if len(all) != 1 {
		t.Fatalf("the upstream got %d requests, want 1", len(all))
	}
	return all[0]
}
