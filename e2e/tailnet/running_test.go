package tailnet_test

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// TestStartupLogAndHealth goes on with what control may change later: the end of the key, and the name.
func TestStartupLogAndHealth(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.connected("[proxy]")
	var got []string
	for _, line := range f.Proxy.Logs() {
		got = append(got, line.Message()+" "+line.Text("path")+line.Text("listen_addr")+line.Text("addr"))
	}
	want := []string{ // the runbook's sequence, with the keys that it shows
		"starting anthropic-oauth-proxy ",
		"loading configuration " + f.Proxy.ConfigFile,
		"configuration loaded 127.0.0.1:0",
		"state: ConnectingTailnet ",
		"state: Starting ",
		proxytest.MsgRunning + " " + f.Proxy.Addr(),
	}
	if !slices.Equal(got, want) {
		t.Errorf("logged\n%q\nwant\n%q", got, want)
	}
	f.awaitHealth(healthy)
	f.Gauge(1, "tailnet_connected")
	f.Gauge(1, "tailnet_control_online")
	const expires = "tailnet_key_expiry_timestamp_seconds"
	if proxytest.Scrape(t, f.Proxy).Has(expires) {
		t.Errorf("%s is there, but the key never expires", expires)
	}
	expiry := time.Now().Add(24 * time.Hour).Truncate(time.Second)
	f.do(f.tailnet.Control.SetMemberExpiry(hostname, expiry))
	f.Gauge(float64(expiry.Unix()), expires)
	code, steps, said := f.doctor()
	if code != 0 || steps != "config tailscaled dns tcp tls http" || !strings.Contains(said, "Running as anthropic-oauth-proxy (100.64.0.1)") {
		t.Errorf("-check ends with %d after %q: %s", code, steps, said)
	}
	f.do(f.tailnet.Control.Rename(hostname, hostname+"-1"))
	f.awaitHealth(`"tailnet_hostname":"anthropic-oauth-proxy-1"`)
	line := proxytest.WaitLog(t, f.Proxy, "this node has another name than tailscale.hostname says; clients reach it under its actual name")
	if all := complaints(f.Proxy); len(all) != 1 || line.Text("level") != "WARN" || line.Text("tailnet_hostname") != hostname+"-1" {
		t.Errorf("the other name is warned about as %v", all)
	}
}

// TestSIGTERMWhileConnecting: a pod may be deleted before it is connected.
func TestSIGTERMWhileConnecting(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.launch(f.sidecar, "")
	f.awaitRetry(4)
	if took := f.Terminate(); took > soon {
		t.Errorf("it ended %v after SIGTERM, want %v", took, soon)
	}
	proxytest.WaitLog(t, f.Proxy, proxytest.MsgDrained)
	proxytest.WaitLog(t, f.Proxy, proxytest.MsgShutdownComplete)
}

// TestRequireTailnetFailsClosed: callers whom tailscaled, killed or stopped, does not name within 10 s are refused, to come again.
func TestRequireTailnetFailsClosed(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tailnet.Options{})
			f.connected("[proxy]\nrequire_tailnet = true")
			f.do(f.sidecar.Signal(sig))
			start := time.Now()
			f.Refused(f.Post(), 503, "caller_unknown", 0, "")
			if took := time.Since(start); took > 10*time.Second+soon {
				t.Errorf("refused after %v, want 10 s at most", took)
			}
			f.upstreamGot(0)
		})
	}
}

// TestControlLostWhileRunning has a client at work meanwhile, through WireGuard.
func TestControlLostWhileRunning(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.connected("")
	_, c := f.client("laptop")
	next, finish := f.stream(c, f.url())
	f.Gauge(1, "tailnet_control_online")

	f.tailnet.Control.Stop()
	f.Gauge(0, "tailnet_control_online")
	if !proxytest.Scrape(t, f.Proxy).Has("tailnet_control_online") {
		t.Error("tailnet_control_online has gone, want 0")
	}
	for range 59 {
		next()
	}
	finish()
	f.served(c, f.url())
	f.follows(true, soon) // the tailnet still works
	if lines := complaints(f.Proxy); len(lines) > 0 {
		t.Errorf("%v, want no word of a loss", lines)
	}
	if line := completed(f.Proxy)[0]; line.Number("status") != 200 || line.Text("error") != "" {
		t.Errorf("the stream was logged as %s", line.Raw)
	}

	f.tailnet.Control.Start()
	f.Gauge(1, "tailnet_control_online")
}

// TestLoginsThatDoNotEnd: an OAuth client and workload identity, as nix/login.nix has containerboot log in with them.
func TestLoginsThatDoNotEnd(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{AuthKey: rightKey})
	token := f.File("token", tailnet.IDToken)
	for name, login := range map[string]string{
		"oauth-client":      "TS_CLIENT_SECRET=" + tailnet.ClientSecret + "?baseURL=" + f.tailnet.Control.URL,
		"workload-identity": "TS_ID_TOKEN=file:" + token,
	} {
		n := f.newNode(name, "tag:claude")
		f.do(n.BootWith("TS_CLIENT_ID="+tailnet.ClientID, login))
		f.do(n.Await(ipn.Running))
	}
}
