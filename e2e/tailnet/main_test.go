package tailnet_test

import (
	"flag"
	"io"
	"log"
	"os"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestMain lets all tests run at once: they wait far more than they work, half a minute each where the proxy uses its
// retries up.
func TestMain(m *testing.M) {
	tailnet.MustBuild()
	log.SetOutput(io.Discard)                               // the test control server and the STUN server talk there
	if err := flag.Set("test.parallel", "32"); err != nil { // unless the command line, which is parsed later, says otherwise
		panic(err)
	}
	os.Exit(proxytest.Main(m))
}
