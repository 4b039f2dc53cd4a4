package tailnet_test

import (
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tailscale.com/ipn"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/tailnet"
)

// logPrefix is how every line begins.
var logPrefix = regexp.MustCompile(`^\{"timestamp":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z","level":"[A-Z]+","message":"`)

func TestStartupLogAndHealth(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("[proxy]")
	var got []string
	for _, line := range p.Logs() {
		if !logPrefix.MatchString(line.Raw) {
			t.Errorf("log line %s does not begin with timestamp, level, message", line.Raw)
		}
		got = append(got, line.Message()+" "+line.Text("path")+line.Text("listen_addr")+line.Text("addr"))
	}
	want := []string{ // the runbook's sequence, with the keys that it shows
		"starting anthropic-oauth-proxy ",
		"loading configuration " + p.ConfigFile,
		"configuration loaded 127.0.0.1:0",
		"state: ConnectingTailnet ",
		"state: Starting ",
		proxytest.MsgRunning + " " + p.Addr(),
	}
	if !slices.Equal(got, want) {
		t.Errorf("logged\n%q\nwant\n%q", got, want)
	}
	f.checkHealth(p, http.StatusOK, healthy)
	f.gauge(p, "tailnet_connected", 1)
	f.gauge(p, "tailnet_control_online", 1)
	const expires = "tailnet_key_expiry_timestamp_seconds"
	if proxytest.Scrape(t, p).Has(expires) {
		t.Errorf("%s is there, but the key never expires", expires)
	}
	expiry := time.Now().Add(24 * time.Hour).Truncate(time.Second)
	f.do(f.tailnet.Control.SetMemberExpiry(hostname, expiry))
	f.gauge(p, expires, float64(expiry.Unix()))
	code, steps, said := f.doctor()
	if code != 0 || steps != "config tailscaled dns tcp tls http" || !strings.Contains(said, "Running as anthropic-oauth-proxy (100.64.0.1)") {
		t.Errorf("-check ends with %d after %q: %s", code, steps, said)
	}
}

// TestSlowLogin: a login that takes some seconds is the ordinary case.
func TestSlowLogin(t *testing.T) {
	t.Parallel()
	const delay = 10 * time.Second
	f := setUp(t, tailnet.Options{AuthKey: rightKey, LoginDelay: delay})
	p := f.launch(f.sidecar, "")
	f.do(f.sidecar.BootWith("TS_AUTHKEY=" + rightKey))
	f.do(p.WaitRunning(delay + proxytest.Timeout))
	if lasted := time.Since(p.Started); lasted < delay {
		t.Errorf("running after %v, before the login can have ended", lasted)
	}
	if lines := linesWith(p, "level", "ERROR"); len(lines) > 0 {
		t.Errorf("a slow login was logged as an error: %v", lines)
	}
	f.follows(p, true, soon)
}

// TestSIGTERMWhileConnecting: a pod may be deleted before it is connected.
func TestSIGTERMWhileConnecting(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.launch(f.sidecar, "")
	f.awaitRetry(p, 4)
	f.do(p.Signal(syscall.SIGTERM))
	code, err := p.Wait(soon)
	f.do(err)
	if code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	for _, message := range []string{proxytest.MsgSIGTERM, proxytest.MsgDrained, proxytest.MsgShutdownComplete} {
		proxytest.WaitLog(t, p, message)
	}
}

// TestSidecarStartsOver: containerboot exits when its node leaves the tailnet, the kubelet starts it again, and it logs
// in. The proxy sees its daemon end and another one come.
func TestSidecarStartsOver(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.keepBooting(rightKey)
	p := f.launch(f.sidecar, "")
	f.do(p.WaitRunning(proxytest.Timeout))
	starts := func() int { return strings.Count(f.sidecar.Log(), "Starting tailscaled") }
	// Until then containerboot would take a logout for a login that is not over.
	proxytest.Eventually(t, "containerboot's start is complete", func() bool { return strings.Contains(f.sidecar.Log(), "Startup complete") })
	before := starts()

	_ = f.sidecar.Logout(f.ctx) // it fails if the daemon ends before it has answered
	// The loss may be over before it can be seen here: the first restart is quick.
	proxytest.Within(t, time.Minute, "a restart of the sidecar", func() bool { return starts() > before })
	f.await(ipn.Running)
	f.follows(p, true, soon)
	// Another address, unless the daemon died before it had thrown its key away.
	f.awaitHealth(p, `"tailnet_ip":"`+f.ip(f.sidecar)+`"`)
	f.served(http.DefaultClient, p.URL())
	// It may see the logout before the end.
	if losses := linesWith(p, "message", "tailnet connection lost; requests that still arrive are served"); len(losses) > 2 {
		t.Errorf("one loss was logged %d times: %v", len(losses), losses)
	}
}

// TestRequireTailnetFailsClosed: callers whom tailscaled does not name within 10 s are refused, to come again.
func TestRequireTailnetFailsClosed(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(*tailnet.Node) error{"dead daemon": (*tailnet.Node).Kill, "hung daemon": (*tailnet.Node).Freeze} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := setUp(t, tailnet.Options{})
			p := f.running("[proxy]\nrequire_tailnet = true")
			f.do(lose(f.sidecar))
			start := time.Now()
			a := f.post(http.DefaultClient, p.URL())
			if took := time.Since(start); a.StatusCode != http.StatusServiceUnavailable || !strings.Contains(a.Text, "caller_unknown") || took > 10*time.Second+soon {
				t.Errorf("status %d after %v, want 503 after 10 s at most: %s", a.StatusCode, took, a.Text)
			}
			f.upstreamGot(0)
		})
	}
}

func TestControlLostWhileRunning(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	p := f.running("")
	_, c := f.client("laptop")
	f.gauge(p, "tailnet_control_online", 1)
	f.served(c, f.tailnetURL(p))

	f.do(f.tailnet.Control.Stop())
	t.Logf("told after %v", f.gauge(p, "tailnet_control_online", 0))
	f.served(c, f.tailnetURL(p))
	f.follows(p, true, soon) // the tailnet still works
	if lines := complaints(p); len(lines) > 0 {
		t.Errorf("%v, want no word of a loss", lines)
	}

	f.do(f.tailnet.Control.Start())
	t.Logf("told after %v", f.gauge(p, "tailnet_control_online", 1))
}

// TestAnotherHostnameIsWarnedAboutAndUsed: one that the node asks for, and one that it is given later.
func TestAnotherHostnameIsWarnedAboutAndUsed(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{})
	f.sidecar.Name = "another-name"
	p := f.running("")
	f.checkHealth(p, http.StatusOK, strings.Replace(healthy, hostname, "another-name", 1))
	f.do(f.tailnet.Control.Rename("another-name", hostname+"-1"))
	f.awaitHealth(p, `"tailnet_hostname":"anthropic-oauth-proxy-1"`)
	for i, name := range []string{"another-name", hostname + "-1"} {
		proxytest.Eventually(f.t, "a warning about "+name, func() bool { return len(complaints(p)) > i })
		if line := complaints(p)[i]; line.Text("level") != "WARN" || !strings.Contains(line.Raw, name) ||
			line.Message() != "this node has another name than tailscale.hostname says; clients reach it under its actual name" {
			t.Errorf("%s, want a warning about %s", line.Raw, name)
		}
	}
	if lines := complaints(p); len(lines) != 2 {
		t.Errorf("warnings %v, want one about each name", lines)
	}
}

// TestLoginsThatDoNotEnd: an OAuth client and workload identity, as nix/login.nix has containerboot log in with them.
func TestLoginsThatDoNotEnd(t *testing.T) {
	t.Parallel()
	f := setUp(t, tailnet.Options{AuthKey: rightKey})
	token := filepath.Join(t.TempDir(), "token")
	f.do(os.WriteFile(token, []byte(tailnet.IDToken), 0o600))
	for name, login := range map[string]string{
		"oauth-client":      "TS_CLIENT_SECRET=" + tailnet.ClientSecret + "?baseURL=" + f.tailnet.Control.URL,
		"workload-identity": "TS_ID_TOKEN=file:" + token,
	} {
		n := f.newNode(name, "tag:claude")
		f.do(n.BootWith("TS_CLIENT_ID="+tailnet.ClientID, login))
		f.do(n.AwaitState(f.ctx, ipn.Running))
	}
}
