//go:build faults

package faults

import (
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// clockFaults are those of time itself.
var clockFaults = []fault{
	{name: "the wall clock is set an hour forward, and back by two", release: true,
		outcome: "nobody notices: no wait ends, requests in the queue and in all phases go on, and durations are what they were", run: wallClockSteps},
	{name: "the process is stopped for longer than `timeout_secs`, as a container is that freezes", release: true,
		outcome: "what came meanwhile counts: streams, uploads and waiting requests go on; a wait that is over is over a second later", run: processStops},
}

// phases hold up streams and waiting requests at the upstream.
type phases struct {
	s       *scene
	events  chan struct{} // each is one more event of a stream; closed at the end of all
	answers chan struct{} // closed when waiting requests get theirs
}

// server is an upstream that answers the body "{}" with a stream, "hopeless" never, and others with their length.
func (p *phases) server() string {
	p.events, p.answers = make(chan struct{}), make(chan struct{})
	return p.s.server(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		if string(body) == "{}" {
			sendEvent(w)
			for range p.events {
				sendEvent(w)
			}
			return
		}
		answers := p.answers
		if string(body) == "hopeless" {
			answers = nil
		}
		select {
		case <-answers:
			fmt.Fprint(w, len(body))
		case <-r.Context().Done():
		}
	})
}

func wallClockSteps(s *scene) {
	const timeout = 3 * time.Second
	began := time.Now()
	p := &phases{s: s}
	s.Launch(proxytest.Options{
		Binary: s.steppable(),
		Args:   proxytest.Serve(p.server()),
		Config: "[proxy]\ntimeout_secs = 3\nmax_connections = 3\nmax_body_mb = 2\n",
	})
	streaming, waiting := s.stream(), s.patiently("waiting")
	body, rest := io.Pipe()
	uploading := s.InBackground(body)
	io.WriteString(rest, "begun")
	s.AtWork(3)
	queued := s.InBackground(strings.NewReader("queued"))
	s.Queued(1)
	piece, sent := strings.Repeat(".", 8<<10), 0 // while somebody waits for its place, an upload must not be slow
	for _, step := range []struct {
		sig  syscall.Signal
		hour time.Duration
	}{{syscall.SIGUSR1, 1}, {syscall.SIGUSR2, 0}, {syscall.SIGUSR2, -1}} {
		s.stepWall(step.sig, step.hour*time.Hour)
		for until := time.Now().Add(timeout + timeout/8); time.Now().Before(until); proxytest.Settle() { // every timer fires meanwhile
			p.events <- struct{}{}
			io.WriteString(rest, piece)
			sent++
		}
	}
	close(p.events)
	rest.Close()
	close(p.answers)
	s.Passed(<-streaming, 200, strings.Repeat(proxytest.Event, 1+sent), 1)
	s.Passed(<-uploading, 200, fmt.Sprint(len("begun")+sent*len(piece)), 1)
	s.Passed(<-waiting, 200, "7", 1)
	s.Passed(<-queued, 200, "6", 1)
	s.stepWall(syscall.SIGUSR1, 0)
	s.stepWall(syscall.SIGUSR1, time.Hour) // idle connections look old
	s.Passed(s.Post(), 200, posted, 1)
	s.Completed()
	s.checkDurations(time.Since(began))
}

// stepWall moves the proxy's wall clock and waits until it is that much ahead.
func (s *scene) stepWall(sig syscall.Signal, ahead time.Duration) {
	s.Helper()
	proxytest.Check(s.T, s.Proxy.Signal(sig))
	proxytest.Eventually(s.T, fmt.Sprintf("a clock that is %v ahead", ahead), func() bool {
		resp, err := s.Client.Get(s.Proxy.URL() + "/livez")
		if err != nil {
			return false
		}
		resp.Body.Close()
		date, err := http.ParseTime(resp.Header.Get("Date"))
		return err == nil && (time.Until(date)-ahead).Abs() < time.Minute
	})
}

// checkDurations checks the durations that the proxy tells, in a scene that has lasted this long.
func (s *scene) checkDurations(lasted time.Duration) {
	s.Helper()
	for _, l := range s.Completed() {
		if total, first := l.Number("latency_ms"), l.Number("ttfb_ms"); first < 0 || total < first || total > float64(lasted.Milliseconds()) {
			s.Errorf("latency_ms is %v and ttfb_ms %v, in %v", total, first, lasted)
		}
	}
	for name, h := range proxytest.Scrape(s.T, s.Proxy) {
		for _, metric := range h.GetMetric() {
			if sum := metric.GetHistogram().GetSampleSum(); sum < 0 || sum > float64(len(s.Expects))*lasted.Seconds() {
				s.Errorf("the sum of %s is %v, in %v", name, sum, lasted)
			}
		}
	}
	health := struct {
		Uptime float64 `json:"uptime_seconds"`
	}{-1}
	_, body, err := s.Proxy.Health()
	if err = errors.Join(err, json.Unmarshal(body, &health)); err != nil || health.Uptime < 0 || health.Uptime > lasted.Seconds()+1 {
		s.Errorf("/health says %s (%v), after %v", body, err, lasted)
	}
}

func processStops(s *scene) {
	const each, stopped = 5, 5500 * time.Millisecond
	p := &phases{s: s}
	s.Start(p.server(), "[proxy]\ntimeout_secs = 5\ntimeout_retries = 0\n")
	var streaming, waiting []<-chan proxytest.Answer
	for range each {
		streaming = append(streaming, s.stream())
		waiting = append(waiting, s.InBackground(strings.NewReader("waiting")))
	}
	body, rest := io.Pipe()
	uploading := s.InBackground(body)
	io.WriteString(rest, "first half, ")
	hopeless := s.InBackground(strings.NewReader("hopeless"))
	s.AtWork(2*each + 2)
	proxytest.Check(s.T, s.Proxy.Signal(syscall.SIGSTOP))
	proxytest.Settle()
	for range each {
		p.events <- struct{}{}
	}
	close(p.answers)
	io.WriteString(rest, "second half")
	time.Sleep(stopped)
	proxytest.Check(s.T, s.Proxy.Signal(syscall.SIGCONT))
	began := time.Now()
	close(p.events)
	rest.Close()
	for i := range each {
		s.Passed(<-streaming[i], 200, proxytest.Event+proxytest.Event, 1)
		s.Passed(<-waiting[i], 200, "7", 1)
	}
	s.Passed(<-uploading, 200, "23", 1)
	s.Refused(<-hopeless, 504, "timeout", 1, "no response headers in time")
	s.within("given up", time.Since(began), 0, 5*time.Second)
}

// What is added to package time, and to the program.
var (
	//go:embed overlay/time.go.txt
	stepTime []byte
	//go:embed overlay/main.go.txt
	stepMain []byte
)

// steppable builds the proxy as it is released, but with a wall clock of its own, which SIGUSR1 sets forward by an hour and
// SIGUSR2 back: the machine's is nobody's to set in a test.
func (s *scene) steppable() (binary string) {
	s.Helper()
	root := proxytest.Must(exec.Command("go", "env", "GOROOT").Output())(s.T)
	clock := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source := proxytest.Must(os.ReadFile(clock))(s.T)
	const reading = "sec, nsec, mono := runtimeNow()"
	if n := strings.Count(string(source), reading); n != 1 {
		s.Fatalf("%s has %q %d times, want once: this Go needs another way to step the clock", clock, reading, n)
	}
	return proxytest.Must(proxytest.BuildWith(s.TempDir(), map[string][]byte{
		clock: []byte(strings.Replace(string(source), reading, "sec, nsec, mono := steppedNow()", 1)),
		filepath.Join(filepath.Dir(clock), "zz_step.go"): stepTime,
		"zz_step.go": stepMain,
	}, "-ldflags", "-s -w"))(s.T)
}
