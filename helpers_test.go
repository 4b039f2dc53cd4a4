package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// testConfig returns the configuration of a file with the given text.
func testConfig(t testing.TB, text string, o overrides) *config {
	t.Helper()
	cfg, err := parseConfig("c.toml", []byte(text), o)
	if err != nil {
		t.Fatalf("configuration refused:\n%v", err)
	}
	return cfg
}

// equal wants got to be want; what says of what.
func equal[T any](t testing.TB, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s:\ngot  %+v\nwant %+v", what, got, want)
	}
}

// holds fails the test unless a condition does, with what was the case instead.
func holds(t testing.TB, condition bool, instead string, values ...any) {
	t.Helper()
	if !condition {
		t.Errorf(instead, values...)
	}
}

// together calls f n times at once, each with its number, and waits for all.
func together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

// must returns what a call that is no part of the test has made.
func must[T any](made T, err error) T {
	if err != nil {
		panic(err)
	}
	return made
}

// errorText returns an error's text, "" for nil.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// valid returns s as JSON and TOML carry it: what is not UTF-8 is replaced, byte by byte.
func valid(s string) string { return string([]rune(s)) }

// inBubble runs f as a subtest in a bubble of synctest.
func inBubble(t *testing.T, name string, f func(t *testing.T)) {
	t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
}

// inBubbles runs f for each of the rows, as a subtest in a bubble.
func inBubbles[R any](t *testing.T, rows map[string]R, f func(t *testing.T, row R)) {
	for name, row := range rows {
		inBubble(t, name, func(t *testing.T) { f(t, row) })
	}
}

// logRecorder keeps the lines of a log.
type logRecorder struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	flush func() // has lines that wait written, if not nil
}

// syncLogger returns a logger whose lines are in l at once.
func (l *logRecorder) syncLogger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: levelTrace, ReplaceAttr: nameAttr}))
}

// Write implements io.Writer.
func (l *logRecorder) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

// logLine is one decoded line.
type logLine map[string]any

// time returns when the line was written.
func (l logLine) time() time.Time {
	return must(time.Parse(time.RFC3339Nano, fmt.Sprint(l["timestamp"])))
}

// expect wants the line to have these fields: names and values in turn.
func (l logLine) expect(t testing.TB, fields ...any) {
	t.Helper()
	for i := 0; i+1 < len(fields); i += 2 {
		if name := fields[i].(string); l[name] != fields[i+1] {
			t.Errorf("%s is %v, want %v, in the line %v", name, l[name], fields[i+1], l)
		}
	}
}

// lines returns the lines so far; with messages, only those that have one of them.
func (l *logRecorder) lines(t testing.TB, messages ...string) (lines []logLine) {
	t.Helper()
	if l.flush != nil {
		l.flush()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for text := range strings.Lines(l.buf.String()) {
		var line logLine
		equal(t, "reading "+text, json.Unmarshal([]byte(text), &line), nil)
		if message, _ := line["message"].(string); len(messages) == 0 || slices.Contains(messages, message) {
			lines = append(lines, line)
		}
	}
	return lines
}

// one returns the only line with the message.
func (l *logRecorder) one(t testing.TB, message string) logLine {
	t.Helper()
	lines := l.lines(t, message)
	if len(lines) != 1 {
		t.Fatalf("%d lines say %q, want one; the log:\n%s", len(lines), message, l.buf.String())
	}
	return lines[0]
}

// pipeListener accepts the connections that its dial makes, in memory: a bubble of synctest can tell
// that they are idle, and moves its clock on.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

// dial connects to the listener.
func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

// rig is a whole serving process in a bubble of synctest, except that its connections, to clients and to the upstream, are pipes.
type rig struct {
	*life
	t       *testing.T
	log     logRecorder
	front   *pipeListener
	probes  *pipeListener // of health_addr
	client  *http.Transport
	pool    *pool
	signals chan os.Signal
	done    chan struct{} // closed when live has returned err
	err     error
	dials   atomic.Int32 // connections to the upstream that were asked for
	// wrap, if not nil, is given the n-th upstream connection: it may fail or wrap it, after some time.
	wrap func(n int, conn net.Conn) (net.Conn, error)
}

// rigConnections is how many clients a rig carries at once.
const rigConnections = 20

// newRig starts a process with the given lines in its [proxy] table, in front of an upstream that is a real http.Server.
func newRig(t *testing.T, settings string, upstream http.HandlerFunc) *rig {
	t.Helper()
	r := &rig{t: t, front: newPipeListener(), probes: newPipeListener(), signals: make(chan os.Signal, 2), done: make(chan struct{})}
	cfg := testConfig(t, "[proxy]\nupstream_url = \"http://127.0.0.1:1\"\n"+settings, overrides{local: true})
	log, lines := newLogger(&r.log, levelTrace)
	r.log.flush = func() { lines.flush(time.Minute) }
	r.life = newLife(cfg, []net.Listener{r.front, nil, r.probes}, rigConnections, log, lines)
	r.client = &http.Transport{DialContext: r.front.dial, DisableCompression: true}
	r.pool = r.proxy.upstream.pool

	back := newPipeListener()
	server := &http.Server{Handler: upstream, Protocols: new(http.Protocols), DisableGeneralOptionsHandler: true}
	server.Protocols.SetHTTP1(true)
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(back)
	r.pool.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		n := int(r.dials.Add(1))
		conn, err := back.dial(ctx, network, addr)
		if err == nil && r.wrap != nil {
			conn, err = r.wrap(n, conn)
		}
		if err != nil {
			return nil, err
		}
		return newUpstreamConn(ctx, conn, cfg.timeout), nil
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		defer close(r.done)
		r.err = r.live(ctx, r.signals)
	}()
	t.Cleanup(func() {
		r.client.CloseIdleConnections()
		stop()
		<-r.done
		server.Close()
		r.pool.closeIdle()
		time.Sleep(time.Minute) // dials that nobody waits for, and what net/http lingers on
	})
	synctest.Wait()
	return r
}

// serveRaw has serve answer on each connection to the upstream.
func (r *rig) serveRaw(serve func(conn net.Conn)) {
	r.wrap = func(_ int, conn net.Conn) (net.Conn, error) {
		conn.Close() // this one leads to an http.Server
		here, there := net.Pipe()
		go serve(there)
		return here, nil
	}
}

// overHTTP2 has r speak HTTP/2 with its upstream, if yes.
func (r *rig) overHTTP2(yes bool) {
	r.pool.transport.Protocols = new(http.Protocols)
	r.pool.transport.Protocols.SetHTTP1(!yes)
	r.pool.transport.Protocols.SetUnencryptedHTTP2(yes)
}

// answer is what a client got for a request, and how long after it.
type answer struct {
	status int
	header http.Header
	body   string
	came   []time.Duration // when each piece of the body did
	err    error           // of reading the body
	took   time.Duration
	last   bool // the connection is closed after it
}

// expect wants the answer to be of the given kind, at the given time: such as "200 after 1m0s", with ", last" if the connection is
// closed after it; "cut" is one that breaks off, "none" one that does not come.
func (a answer) expect(t testing.TB, want string) {
	t.Helper()
	if got := a.String(); got != want {
		t.Errorf("%s, want %s: error %v, header %v, body %.300q", got, want, a.err, a.header, a.body)
	}
}

// String implements fmt.Stringer.
func (a answer) String() string {
	kind, end := strconv.Itoa(a.status), ""
	switch {
	case a.status == 0:
		kind = "none"
	case a.err != nil:
		kind = "cut"
	}
	if a.last {
		end = ", last"
	}
	return fmt.Sprintf("%s after %v%s", kind, a.took, end)
}

// read reads all of an answer; start is when the request began.
func (a answer) read(resp *http.Response, start time.Time) answer {
	var body []byte
	for piece := make([]byte, 32<<10); a.err == nil; {
		var n int
		if n, a.err = resp.Body.Read(piece); n > 0 {
			body, a.came = append(body, piece[:n]...), append(a.came, time.Since(start))
		}
	}
	if a.err == io.EOF {
		a.err = nil
	}
	a.status, a.header, a.body, a.took, a.last = resp.StatusCode, resp.Header, string(body), time.Since(start), resp.Close
	return a
}

// do sends a request and reads its whole answer. header holds names and values in turn.
func (r *rig) do(method, path, body string, header ...string) answer {
	return r.doFor(time.Hour*24, method, path, body, header...)
}

// doFor is do for a client that leaves after patience.
func (r *rig) doFor(patience time.Duration, method, path, body string, header ...string) answer {
	ctx, leave := context.WithTimeout(context.Background(), patience)
	defer leave()
	req := must(http.NewRequestWithContext(ctx, method, "http://proxy"+path, nil))
	if body != "" {
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	start := time.Now()
	resp, err := r.client.RoundTrip(req)
	if err != nil {
		return answer{err: err, took: time.Since(start)}
	}
	defer resp.Body.Close()
	return answer{}.read(resp, start)
}

// post is do with a POST of a small body to /v1/messages.
func (r *rig) post(header ...string) answer {
	return r.do(http.MethodPost, "/v1/messages", `{"max_tokens":1}`, header...)
}

// dialRaw returns a client connection for requests that are written by hand.
func (r *rig) dialRaw() *rawConnection {
	conn := must(r.front.dial(context.Background(), "", ""))
	r.t.Cleanup(func() { conn.Close() })
	return &rawConnection{Conn: conn, start: time.Now()}
}

// ask sends text on a connection of its own, as far as it is read, and reads the answer.
func (r *rig) ask(text string) answer {
	c := r.dialRaw()
	defer c.Close()
	go c.send(text)
	return c.answer()
}

// rawConnection is a client's side of a connection.
type rawConnection struct {
	net.Conn
	start time.Time
}

// send writes text; a proxy that reads no more is none of its business.
func (c *rawConnection) send(text string) error {
	_, err := io.WriteString(c.Conn, text)
	return err
}

// answer reads an answer; took counts from the dial.
func (c *rawConnection) answer() answer {
	resp, err := http.ReadResponse(bufio.NewReader(c.Conn), nil)
	if err != nil {
		return answer{err: err, took: time.Since(c.start)}
	}
	return answer{}.read(resp, c.start)
}

// completed returns the log line of the only request so far.
func (r *rig) completed() logLine {
	r.t.Helper()
	synctest.Wait()
	return r.log.one(r.t, "request completed")
}

// expectErrors wants exactly these upstream errors to be counted, in the order of the page, and nothing else to be left of
// the requests so far.
func (r *rig) expectErrors(want ...errorType) {
	r.t.Helper()
	r.expectNothingLeft()
	var got []errorType
	for i, kind := range errorTypes {
		got = append(got, slices.Repeat([]errorType{kind}, int(r.proxy.metrics.errors[i].Load()))...)
	}
	equal(r.t, "the errors counted", got, want)
}

// expectNothingLeft wants all requests to have ended, and to have given back what they held.
func (r *rig) expectNothingLeft() {
	r.t.Helper()
	synctest.Wait()
	places, inLine := r.proxy.places.load()
	bytes, inLineForBytes := r.proxy.bodies.budget.load()
	equal(r.t, "places taken and waited for, bytes taken and waited for, requests left", []int64{places, inLine, bytes, inLineForBytes, r.proxy.active.Load()}, make([]int64, 5))
}

// never is an upstream that reads the request and never answers.
func never(_ http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	<-r.Context().Done()
}

// echo is an upstream that answers with the request's body.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	w.Write(body)
}
