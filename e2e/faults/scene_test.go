//go:build faults

package faults

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A scene is where one fault happens: a proxy of its own, and what is expected of it.
type scene struct {
	*testing.T
	proxy  *proxytest.Proxy
	fault  fault
	before usage  // of the proxy, before anything happened
	lines  []line // of all requests, in any order
	mend   func() // makes the upstream serve /plain; nil if it always does
	hangUp func() // ends the upstream's connections
	mute   bool   // the proxy's log is lost
	client *http.Client
}

// usage is what the proxy holds.
type usage struct{ goroutines, descriptors float64 }

// A line is a "request completed" that is expected.
type line struct {
	status    int
	attempts  int    // -1: any number
	errorType string // of proxy_upstream_errors_total; empty: not counted there
	err       string // begins the field "error", or is contained in it; empty: there is none
}

func newScene(t *testing.T, f fault) *scene {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &scene{T: t, fault: f, client: &http.Client{Transport: transport, Timeout: proxytest.Timeout}}
}

// quick is a configuration that makes every wait as short as it can be: for faults
// whose subject it is, as on a busy machine anything may take a second.
const quick = "[proxy]\ntimeout_secs = 1\nconnect_timeout_secs = 1\ntimeout_retries = 1\ndrain_timeout_secs = 1\n"

// start runs the proxy in front of an upstream, and waits until it serves.
func (s *scene) start(upstream, config string, env ...string) {
	s.Helper()
	s.launch(proxytest.Options{
		Args:   []string{"-local", "-listen", "127.0.0.1:0", "-upstream", upstream},
		Config: config,
		Env:    append(env, "GORACE=halt_on_error=1"),
	})
}

// launch is start with these options.
func (s *scene) launch(o proxytest.Options) {
	s.Helper()
	if !s.fault.release && o.Binary == "" {
		binary, err := proxytest.BuildRaced()
		if err != nil {
			s.Fatal(err)
		}
		o.Binary = binary
	}
	s.proxy = proxytest.Launch(s.T, o)
	if err := s.proxy.WaitRunning(proxytest.Timeout); err != nil {
		s.Fatal(err)
	}
	for range 2 { // the first look costs memory and a descriptor of the poller's that stay
		s.before = s.usage()
	}
}

// usage looks at what the proxy holds.
func (s *scene) usage() usage {
	m := proxytest.Scrape(s.T, s.proxy)
	return usage{goroutines: m.Value("go_goroutines"), descriptors: m.Value("process_open_fds")}
}

// expect says what the log will have.
func (s *scene) expect(lines ...line) { s.lines = append(s.lines, lines...) }

// An answer is a response and how its body ended.
type answer struct {
	*http.Response
	body []byte
	err  error
}

// post sends a small Messages request; the headers are pairs.
func (s *scene) post(headers ...string) answer {
	s.Helper()
	return s.must(s.send("POST", "/v1/messages", strings.NewReader(`{"model":"claude"}`), headers...))
}

// get sends a request without a body.
func (s *scene) get(path string) answer {
	s.Helper()
	return s.must(s.send("GET", path, nil))
}

// must is for an answer that there has to be.
func (s *scene) must(a answer, err error) answer {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
	return a
}

// send sends a request and reads the answer to its end.
func (s *scene) send(method, path string, body io.Reader, headers ...string) (answer, error) {
	req, err := http.NewRequestWithContext(s.Context(), method, s.proxy.URL()+path, body)
	if err != nil {
		return answer{}, err
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	return ask(s.client, req)
}

// ask sends a request and reads the answer to its end.
func ask(client *http.Client, req *http.Request) (answer, error) {
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	a := answer{Response: resp}
	a.body, a.err = io.ReadAll(resp.Body)
	return a, nil
}

// refused checks that a is the proxy's own error, with this status and code, and
// expects its log line: with err, after attempts.
func (s *scene) refused(a answer, status int, code string, attempts int, err string) {
	s.Helper()
	var body struct {
		Type  string
		Error struct{ Type, Code, Message string }
	}
	if e := json.Unmarshal(a.body, &body); a.err != nil || e != nil || a.StatusCode != status || body.Type != "error" ||
		body.Error.Type != "proxy_error" || body.Error.Code != code || body.Error.Message == "" {
		s.Errorf("the client got status %d and %.300q (%v), want %d and code %s", a.StatusCode, a.body, a.err, status, code)
	}
	l := line{status: status, attempts: attempts, err: err}
	switch code {
	case "timeout", "connection", "invalid_request", "response_read", "internal":
		l.errorType = code
	}
	s.expect(l)
}

// passed checks that a is the upstream's, whole, and expects its log line.
func (s *scene) passed(a answer, status int, body string, attempts int) {
	s.Helper()
	if a.StatusCode != status || string(a.body) != body || a.err != nil {
		s.Errorf("the client got status %d and %.300q (%v), want %d and %.300q", a.StatusCode, a.body, a.err, status, body)
	}
	s.expect(line{status: status, attempts: attempts})
}

// broken checks that the client got the beginning of an answer and can tell that
// it is not whole, and expects its log line.
func (s *scene) broken(a answer, beginning, err string) {
	s.Helper()
	if a.StatusCode != http.StatusOK || !strings.HasPrefix(string(a.body), beginning) {
		s.Errorf("the client got status %d and %.300q, want 200 and %q", a.StatusCode, a.body, beginning)
	}
	if a.err == nil {
		s.Error("the broken answer looks whole to the client")
	}
	s.expect(line{status: 200, attempts: 1, errorType: "response_read", err: err})
}

// eventually polls until what is wrong is nothing any more.
func (s *scene) eventually(wrong func() string) {
	s.Helper()
	var last string
	for deadline := time.Now().Add(proxytest.Timeout); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if last = wrong(); last == "" {
			return
		}
	}
	s.Errorf("after %v: %s", proxytest.Timeout, last)
}

// completed returns the lines of completed requests.
func (s *scene) completed() []proxytest.Line {
	var lines []proxytest.Line
	for _, l := range s.proxy.Logs() {
		if l.Message() == proxytest.MsgRequestCompleted {
			lines = append(lines, l)
		}
	}
	return lines
}

// aftermath checks what the fault left behind: nothing, but one log line and one
// count for each request.
func (s *scene) aftermath() {
	s.Helper()
	select {
	case <-s.proxy.Done(): // as the fault wanted
		s.checkLines()
	default:
		s.stillServes()
		if !s.mute {
			s.checkLines()
		}
		s.checkMetrics()
		s.checkUsage()
		s.checkEnd()
	}
	for _, l := range s.proxy.Logs() {
		if strings.Contains(l.Message(), "panic") {
			s.Errorf("a panic: %v", l)
		}
	}
}

// stillServes sends a plain request.
func (s *scene) stillServes() {
	s.Helper()
	if s.mend != nil {
		s.mend()
	}
	a, err := s.send("GET", "/plain", nil)
	if err != nil {
		s.Fatalf("the proxy serves no more: %v", err)
	}
	s.passed(a, 200, "plain", -1)
}

// checkLines compares the log with what is expected.
func (s *scene) checkLines() {
	s.Helper()
	s.eventually(func() string {
		if n := len(s.completed()); n < len(s.lines) {
			return fmt.Sprintf("%d lines of completed requests, want %d", n, len(s.lines))
		}
		return ""
	})
	missing := append([]line(nil), s.lines...)
	var unexpected []string
next:
	for _, got := range s.completed() {
		for i, want := range missing {
			said := got.Text("error")
			if int(got.Number("status")) == want.status && (want.attempts < 0 || int(got.Number("attempts")) == want.attempts) &&
				(want.err == "") == (said == "") && strings.Contains(said, want.err) {
				missing = append(missing[:i:i], missing[i+1:]...)
				continue next
			}
		}
		unexpected = append(unexpected, fmt.Sprintf("status %v, attempts %v, error %q", got.Number("status"), got.Number("attempts"), got.Text("error")))
	}
	if len(unexpected) > 0 || len(missing) > 0 {
		s.Errorf("the log lacks %+v, and has unexpectedly %q", missing, unexpected)
	}
}

// checkMetrics compares the counters with the log, and sees nothing at work.
func (s *scene) checkMetrics() {
	s.Helper()
	statuses, types, retries := map[string]int{}, map[string]int{}, 0
	completed := s.completed()
	for _, l := range completed {
		statuses[fmt.Sprint(int(l.Number("status")))]++
		retries += max(0, int(l.Number("attempts"))-1)
	}
	for _, l := range s.lines {
		if l.errorType != "" {
			types[l.errorType]++
		}
	}
	s.eventually(func() string {
		m := proxytest.Scrape(s.T, s.proxy)
		var wrong []string
		check := func(want int, name string, labels ...string) {
			if got := m.Value(name, labels...); got != float64(want) {
				wrong = append(wrong, fmt.Sprintf("%s%v = %v, want %d", name, labels, got, want))
			}
		}
		check(len(s.lines), "proxy_requests_total")
		for status, n := range statuses {
			check(n, "proxy_requests_total", "status", status)
		}
		for _, t := range []string{"timeout", "connection", "invalid_request", "response_read", "internal"} {
			check(types[t], "proxy_upstream_errors_total", "error_type", t)
		}
		check(retries, "proxy_upstream_retries_total")
		check(0, "proxy_requests_in_flight")
		check(0, "proxy_requests_queued")
		check(0, "proxy_buffered_body_bytes")
		return strings.Join(wrong, "; ")
	})
}

// checkUsage waits until the proxy holds no more than before, once all
// connections are closed.
func (s *scene) checkUsage() {
	s.Helper()
	s.client.CloseIdleConnections()
	s.eventually(func() string {
		if s.hangUp != nil {
			s.hangUp() // again and again: a connection may still come about
		}
		if now := s.usage(); now.goroutines > s.before.goroutines || now.descriptors > s.before.descriptors {
			return fmt.Sprintf("%v goroutines and %v descriptors, want no more than %v and %v, as before",
				now.goroutines, now.descriptors, s.before.goroutines, s.before.descriptors)
		}
		return ""
	})
}

// checkEnd ends the proxy in an orderly way.
func (s *scene) checkEnd() {
	s.Helper()
	if err := s.proxy.Signal(syscall.SIGTERM); err != nil {
		s.Fatal(err)
	}
	s.ended()
}

// tempFile returns the name of a file with this content.
func (s *scene) tempFile(content []byte) string {
	s.Helper()
	file, err := os.CreateTemp(s.TempDir(), "")
	if err == nil {
		_, err = io.Copy(file, bytes.NewReader(content))
		file.Close()
	}
	if err != nil {
		s.Fatal(err)
	}
	return file.Name()
}
