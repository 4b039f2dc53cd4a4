// Package e2e tests the real binary over real sockets against a fake Anthropic
// API. The tests of this folder need no tailnet: they run the proxy with -local.
// Those on a real tailnet are in ./tailnet.
package e2e

import (
	"flag"
	"os"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func TestMain(m *testing.M) {
	// Most tests wait for a timeout most of the time. -parallel still wins.
	if err := flag.Set("test.parallel", "16"); err != nil {
		panic(err)
	}
	os.Exit(proxytest.Main(m))
}
