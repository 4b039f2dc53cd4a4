package tailnet_test

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run builds tailscale before the clock of -timeout starts, and lets all tests
// run at once: they wait far more than they work, half a minute each where the
// proxy uses its retries up.
func run(m *testing.M) int {
	if _, err := tailnet.Build(context.Background(), os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	log.SetOutput(io.Discard) // the test control server and the STUN server talk there
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", "32"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return proxytest.Main(m)
}
