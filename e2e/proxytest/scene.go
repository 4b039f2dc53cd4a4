package proxytest

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/testca"
)

// A Scene is a test of one proxy. Its methods do what clients and upstreams do, and note what the proxy's log has to say of it; at
// the test's end, the log and the counters have to say exactly that, and the proxy has to hold no more than at its beginning, to
// serve on, and to end with code 0.
type Scene struct {
	*testing.T
	Proxy   *Proxy
	Client  *http.Client
	Raced   bool   // the proxy has the race detector, if Launch is told no other
	Mute    bool   // the proxy's log is lost
	Mend    func() // makes the upstream serve the plain path; nil if it always does
	HangUp  func() // ends the connections of the upstream and of raw clients
	Plain   bool   // the upstream serves [fakeanthropic.PlainPath], which is tried at the end
	Expects []Completed

	before usage // at the beginning
}

// usage is what a proxy holds.
type usage struct{ goroutines, descriptors float64 }

// Completed is a log line "request completed" that is expected.
type Completed struct {
	Status    int
	Attempts  int    // -1: any number
	ErrorType string // of proxy_upstream_errors_total; empty: not counted there
	Err       string // begins the field "error", or is contained in it; empty: there is none
}

// NewScene returns a scene without a proxy.
func NewScene(t *testing.T) *Scene {
	transport := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 100}
	t.Cleanup(transport.CloseIdleConnections)
	return &Scene{T: t, HangUp: func() {}, Client: &http.Client{
		Transport:     transport,
		Timeout:       2 * Timeout, // only to keep a failing test from hanging
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// API runs a fake API, which is closed at the end; a nil handler answers as the real one does.
func (s *Scene) API(protocol fakeanthropic.Protocol, handler http.Handler) *fakeanthropic.Server {
	s.Helper()
	api := Must(fakeanthropic.Start(protocol, handler))(s)
	s.Use(api)
	return api
}

// StartAPI is API and, in front of it, Start.
func (s *Scene) StartAPI(protocol fakeanthropic.Protocol, handler http.Handler, config string, env ...string) *fakeanthropic.Server {
	s.Helper()
	api := s.API(protocol, handler)
	s.Start(api.URL, config, append(api.Env(), env...)...)
	return api
}

// Use makes a fake API the upstream of the scene.
func (s *Scene) Use(api *fakeanthropic.Server) {
	s.Plain = true
	s.atHangUp(api.HangUp)
	s.Cleanup(func() {
		if err := api.Close(); err != nil {
			s.Error(err)
		}
	})
}

// atHangUp has f called by HangUp too.
func (s *Scene) atHangUp(f func()) {
	others := s.HangUp
	s.HangUp = func() { others(); f() }
}

// Authority returns an authority that signs certificates, and the environment in which the proxy trusts it.
func (s *Scene) Authority() (ca *testca.Authority, env string) {
	s.Helper()
	ca = Must(testca.New())(s)
	return ca, "SSL_CERT_FILE=" + s.File("ca.pem", string(ca.PEM))
}

// File writes a file for the time of the scene, and returns its path.
func (s *Scene) File(name, content string) (path string) {
	s.Helper()
	path = filepath.Join(s.TempDir(), name)
	Check(s, os.WriteFile(path, []byte(content), 0o600))
	return path
}

// Start runs the proxy in front of an upstream, with this TOML, which may be empty, and waits until it serves.
func (s *Scene) Start(upstream, config string, env ...string) {
	s.Helper()
	s.Launch(Options{Args: Serve(upstream), Config: config, Env: env})
}

// Serve is the command line of a proxy without a tailnet, on a free port of 127.0.0.1.
func Serve(upstream string) []string {
	return []string{"-local", "-listen", "127.0.0.1:0", "-upstream", upstream}
}

// Launch is Start with these options.
func (s *Scene) Launch(o Options) {
	s.Helper()
	if s.Raced && o.Binary == "" {
		binary := Must(BuildRaced())(s)
		o.Binary = binary
	}
	o.Env = append(slices.Clone(o.Env), "GORACE=halt_on_error=1")
	s.Proxy = Launch(s.T, o)
	wait := s.Proxy.WaitRunning
	if s.Mute {
		wait = s.Proxy.WaitListening
	}
	Check(s, wait(Timeout))
	for range 2 { // the first look costs memory and a descriptor of the poller's that stay
		s.before = s.usage()
	}
	s.Cleanup(s.aftermath)
}

// usage looks at what the proxy holds.
func (s *Scene) usage() usage {
	m := Scrape(s.T, s.Proxy)
	return usage{goroutines: m.Value("go_goroutines"), descriptors: m.Value("process_open_fds")}
}

// Expect says what the log will have.
func (s *Scene) Expect(lines ...Completed) { s.Expects = append(s.Expects, lines...) }

// An Answer is a response with its whole body, or as much as came before Err.
type Answer struct {
	*http.Response
	Text string
	Err  error
}

// Message is a small Messages request.
const Message = `{"model":"claude-fake-1","max_tokens":16,"messages":[{"role":"user","content":"hi"}]}`

// Stream asks for the same as an event stream.
const Stream = `{"model":"claude-fake-1","max_tokens":16,"stream":true,"messages":[{"role":"user","content":"hi"}]}`

// Post sends Message; headers are name, value, name, value ….
func (s *Scene) Post(headers ...string) Answer {
	s.Helper()
	return s.Send("POST", "/v1/messages", strings.NewReader(Message), headers...)
}

// Get sends a request without a body.
func (s *Scene) Get(path string, headers ...string) Answer {
	s.Helper()
	return s.Send("GET", path, nil, headers...)
}

// Send sends a request and reads the answer to its end; there has to be one.
func (s *Scene) Send(method, path string, body io.Reader, headers ...string) Answer {
	s.Helper()
	return Must(s.Try(s.Request(method, path, body, headers...)))(s)
}

// Request makes a request to the proxy with a bearer token.
func (s *Scene) Request(method, path string, body io.Reader, headers ...string) *http.Request {
	s.Helper()
	req := Must(http.NewRequest(method, s.Proxy.URL()+path, body))(s)
	req.Header.Set("Authorization", "Bearer test-token")
	for pair := range slices.Chunk(headers, 2) {
		req.Header.Add(pair[0], pair[1])
	}
	return req
}

// Try sends a request and reads the answer to its end, if there is one.
func (s *Scene) Try(req *http.Request) (Answer, error) { return Ask(s.Client, req) }

// Ask sends a request and reads the answer to its end, if there is one.
func Ask(client *http.Client, req *http.Request) (Answer, error) {
	resp, err := client.Do(req)
	if err != nil {
		return Answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return Answer{resp, string(body), err}, nil
}

// InBackground sends a Messages request with this body. Its answer comes later; that there is none fails the test.
func (s *Scene) InBackground(body io.Reader, headers ...string) <-chan Answer {
	s.Helper()
	answers, req := make(chan Answer, 1), s.Request("POST", "/v1/messages", body, headers...)
	go func() {
		a, err := s.Try(req)
		if err != nil {
			s.Error(err)
			a.Response = &http.Response{} // which no check likes
		}
		answers <- a
	}()
	return answers
}

var ownID = regexp.MustCompile(`^req_[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// Refused checks that a is the proxy's own error, with this status and code, and expects its log line: with err, after attempts.
func (s *Scene) Refused(a Answer, status int, code string, attempts int, err string) {
	s.Helper()
	var body struct {
		Type      string
		RequestID string `json:"request_id"`
		Error     struct {
			Type, Code, Message string
			RequestID           string `json:"request_id"`
		}
	}
	e, id := json.Unmarshal([]byte(a.Text), &body), a.Header.Get("X-Proxy-Request-Id")
	if a.Err != nil || e != nil || a.StatusCode != status || body.Type != "error" || body.Error.Type != "proxy_error" || body.Error.Code != code || body.Error.Message == "" {
		s.Errorf("the client got status %d and %.300q (%v), want %d and code %s", a.StatusCode, a.Text, a.Err, status, code)
	}
	if !ownID.MatchString(id) || a.Header.Get("Request-Id") != id || body.RequestID != id || body.Error.RequestID != id || a.Header.Get("Content-Type") != "application/json" {
		s.Errorf("headers %v and body %s, want application/json and the same request id everywhere", a.Header, a.Text)
	}
	l := Completed{Status: status, Attempts: attempts, Err: err}
	if slices.Contains(errorTypes, code) {
		l.ErrorType = code
	}
	s.Expect(l)
}

// errorTypes are those of proxy_upstream_errors_total.
var errorTypes = []string{"timeout", "connection", "invalid_request", "response_read", "internal"}

// Passed checks that a is the upstream's, whole, and expects its log line.
func (s *Scene) Passed(a Answer, status int, body string, attempts int) {
	s.Helper()
	if a.StatusCode != status || a.Text != body || a.Err != nil {
		s.Errorf("the client got status %d and %.300q (%v), want %d and %.300q", a.StatusCode, a.Text, a.Err, status, body)
	}
	if id := a.Header.Values("X-Proxy-Request-Id"); len(id) != 1 || !ownID.MatchString(id[0]) {
		s.Errorf("x-proxy-request-id %q, want the proxy's own", id)
	}
	s.Expect(Completed{Status: status, Attempts: attempts})
}

// Broken checks that the client got the beginning of an answer and can tell that it is not whole, and expects its log line.
func (s *Scene) Broken(a Answer, beginning, err string) {
	s.Helper()
	if a.StatusCode != http.StatusOK || !strings.HasPrefix(a.Text, beginning) {
		s.Errorf("the client got status %d and %.300q, want 200 and %q", a.StatusCode, a.Text, beginning)
	}
	if a.Err == nil {
		s.Error("the broken answer looks whole to the client")
	}
	s.Expect(Completed{Status: 200, Attempts: 1, ErrorType: "response_read", Err: err})
}

// Completed waits for the lines of all completed requests that are expected, and returns them.
func (s *Scene) Completed() []Line {
	s.Helper()
	Await(s.T, func() string {
		if n := len(s.completed()); n < len(s.Expects) {
			return fmt.Sprintf("%d lines of completed requests, want %d", n, len(s.Expects))
		}
		return ""
	})
	return s.completed()
}

func (s *Scene) completed() []Line {
	return slices.DeleteFunc(slices.Clone(s.Proxy.Logs()), func(l Line) bool { return l.Message() != MsgRequestCompleted })
}

// Gauge waits until a metric has this value.
func (s *Scene) Gauge(want float64, name string, labels ...string) {
	s.Helper()
	Await(s.T, func() string {
		if got := Scrape(s.T, s.Proxy).Value(name, labels...); got != want {
			return fmt.Sprintf("%s%v is %v, want %v", name, labels, got, want)
		}
		return ""
	})
}

// AtWork waits until the proxy is at work on n requests.
func (s *Scene) AtWork(n float64) { s.Helper(); s.Gauge(n, "proxy_requests_in_flight") }

// Queued waits until n requests wait in line.
func (s *Scene) Queued(n float64) { s.Helper(); s.Gauge(n, "proxy_requests_queued") }

// Signal sends SIGTERM and waits until the proxy has heard it.
func (s *Scene) Signal() {
	s.Helper()
	Check(s, s.Proxy.Signal(syscall.SIGTERM))
	WaitLog(s.T, s.Proxy, MsgSIGTERM)
}

// Ended waits until the proxy has ended, as it should.
func (s *Scene) Ended() {
	s.Helper()
	if code, err := s.Proxy.Wait(Timeout); err != nil || code != 0 {
		s.Errorf("the proxy ended with code %d (%v), want 0", code, err)
	}
}

// Terminate is Signal and Ended; it returns how long that took.
func (s *Scene) Terminate() time.Duration {
	s.Helper()
	began := time.Now()
	s.Signal()
	s.Ended()
	return time.Since(began)
}

// aftermath checks what the scene has left behind, unless there was something wrong with it anyway.
func (s *Scene) aftermath() {
	s.Helper()
	if s.Failed() {
		return
	}
	select {
	case <-s.Proxy.Done(): // as the test wanted
		s.checkLines()
	default:
		s.checkPlain()
		if !s.Mute {
			s.checkLines()
		}
		s.checkMetrics()
		s.CheckUsage()
		Check(s, s.Proxy.Signal(syscall.SIGTERM))
		s.Ended()
	}
	for _, l := range s.Proxy.Logs() {
		if strings.Contains(l.Message(), "panic") {
			s.Errorf("a panic: %v", l)
		}
	}
}

// checkPlain sends a plain request, if the upstream is one that would answer it.
func (s *Scene) checkPlain() {
	s.Helper()
	if s.Mend != nil {
		s.Mend()
	}
	if s.Plain {
		s.Passed(s.Get(fakeanthropic.PlainPath), 200, "plain", -1)
	}
}

// checkLines compares the log with what is expected.
func (s *Scene) checkLines() {
	s.Helper()
	missing, unexpected := slices.Clone(s.Expects), []string(nil)
	for _, got := range s.Completed() {
		status, attempts, said := int(got.Number("status")), int(got.Number("attempts")), got.Text("error")
		i := slices.IndexFunc(missing, func(want Completed) bool {
			return status == want.Status && (want.Attempts < 0 || attempts == want.Attempts) && (want.Err == "") == (said == "") && strings.Contains(said, want.Err)
		})
		if i < 0 {
			unexpected = append(unexpected, fmt.Sprintf("status %d, attempts %d, error %q", status, attempts, said))
			continue
		}
		missing = slices.Delete(missing, i, i+1)
	}
	if len(unexpected) > 0 || len(missing) > 0 {
		s.Errorf("the log lacks %+v, and has unexpectedly %q", missing, unexpected)
	}
}

// checkMetrics compares the counters with the log, and sees nothing at work.
func (s *Scene) checkMetrics() {
	s.Helper()
	statuses, types, retries := map[string]int{}, map[string]int{}, 0
	for _, l := range s.completed() {
		statuses[fmt.Sprint(int(l.Number("status")))]++
		retries += max(0, int(l.Number("attempts"))-1)
	}
	for _, l := range s.Expects {
		types[l.ErrorType]++
	}
	Await(s.T, func() string {
		m := Scrape(s.T, s.Proxy)
		var wrong []string
		check := func(want int, name string, labels ...string) {
			if got := m.Value(name, labels...); got != float64(want) {
				wrong = append(wrong, fmt.Sprintf("%s%v = %v, want %d", name, labels, got, want))
			}
		}
		check(len(s.Expects), "proxy_requests_total")
		for status, n := range statuses {
			check(n, "proxy_requests_total", "status", status)
			check(n, "proxy_request_duration_seconds", "status", status)
		}
		for _, t := range errorTypes {
			check(types[t], "proxy_upstream_errors_total", "error_type", t)
		}
		check(retries, "proxy_upstream_retries_total")
		check(0, "proxy_requests_in_flight")
		check(0, "proxy_requests_queued")
		check(0, "proxy_buffered_body_bytes")
		return strings.Join(wrong, "; ")
	})
}

// CheckUsage waits until the proxy holds no more than at the beginning, once all connections are closed.
func (s *Scene) CheckUsage() {
	s.Helper()
	s.Client.CloseIdleConnections()
	Await(s.T, func() string {
		s.HangUp() // again and again: a connection may still come about
		if now := s.usage(); now.goroutines > s.before.goroutines || now.descriptors > s.before.descriptors {
			return fmt.Sprintf("%v goroutines and %v descriptors, want no more than %v and %v, as before",
				now.goroutines, now.descriptors, s.before.goroutines, s.before.descriptors)
		}
		return ""
	})
}
