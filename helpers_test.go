package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
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
func (l logLine) time(t testing.TB) time.Time {
	t.Helper()
	at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(l["timestamp"]))
	if err != nil {
		t.Fatalf("the line %v has no timestamp: %v", l, err)
	}
	return at
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
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("a log line is not JSON: %v\n%s", err, text)
		}
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

// rig is a whole serving process in a bubble of synctest, except that its connections, to clients
// and to the upstream, are pipes.
type rig struct {
	*life
	t       *testing.T
	log     logRecorder
	front   *pipeListener
	client  *http.Transport
	signals chan os.Signal
	done    chan struct{} // closed when live has returned err
	err     error
	dials   atomic.Int32 // connections to the upstream that were asked for
	// wrap, if not nil, is given the upstream connections in its turn: it may fail or wrap them.
	wrap func(n int, conn net.Conn) (net.Conn, error)
}

// newRig starts a process with the given lines in its [proxy] table, in front of an upstream that is
// a real http.Server.
func newRig(t *testing.T, settings string, upstream http.HandlerFunc) *rig {
	t.Helper()
	r := &rig{t: t, front: newPipeListener(), signals: make(chan os.Signal, 2), done: make(chan struct{})}
	cfg := testConfig(t, "[proxy]\nupstream_url = \"http://127.0.0.1:1\"\n"+settings, overrides{local: true})
	log, lines := newLogger(&r.log, levelTrace)
	r.log.flush = func() { lines.flush(time.Minute) }
	r.life = newLife(cfg, r.front, log, lines)
	r.client = &http.Transport{DialContext: r.front.dial, DisableCompression: true}

	back := newPipeListener()
	server := &http.Server{Handler: upstream}
	go server.Serve(back)
	r.proxy.upstream.pool.transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
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
		r.proxy.upstream.pool.closeIdle()
		time.Sleep(time.Second) // net/http lingers for half of that on a connection that it closes
	})
	synctest.Wait()
	return r
}

// answer is what a client got for a request, and how long after it.
type answer struct {
	status int
	header http.Header
	body   string
	err    error // of reading the body
	took   time.Duration
	last   bool // the connection is closed after it
}

// do sends a request and reads its whole answer. header holds names and values in turn.
func (r *rig) do(method, path, body string, header ...string) answer {
	r.t.Helper()
	var content io.Reader
	if body != "" {
		content = strings.NewReader(body)
	}
	req, err := http.NewRequest(method, "http://proxy"+path, content)
	if err != nil {
		r.t.Fatal(err)
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
	got, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(got), err, time.Since(start), resp.Close}
}

// post is do with a POST of a small body to /v1/messages.
func (r *rig) post(header ...string) answer {
	r.t.Helper()
	return r.do(http.MethodPost, "/v1/messages", `{"max_tokens":1}`, header...)
}

// dialRaw returns a client connection for requests that are written by hand.
func (r *rig) dialRaw() *rawConnection {
	r.t.Helper()
	conn, err := r.front.dial(context.Background(), "", "")
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return &rawConnection{Conn: conn, t: r.t, start: time.Now()}
}

// rawConnection is a client's side of a connection.
type rawConnection struct {
	net.Conn
	t     *testing.T
	start time.Time
}

// send writes text; a proxy that reads no more is none of its business.
func (c *rawConnection) send(text string) error {
	_, err := io.WriteString(c.Conn, text)
	return err
}

// answer reads an answer; took counts from the dial.
func (c *rawConnection) answer() answer {
	c.t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c.Conn), nil)
	took := time.Since(c.start)
	if err != nil {
		return answer{err: err, took: took}
	}
	got, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(got), err, took, resp.Close}
}

// errorCounts returns the upstream errors by type, without those that are 0.
func (p *proxy) errorCounts() map[errorType]uint64 {
	counts := map[errorType]uint64{}
	for i, t := range errorTypes {
		if n := p.metrics.errors[i].Load(); n > 0 {
			counts[t] = n
		}
	}
	return counts
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

// requestHeader returns what in becomes on its way upstream, and leaves it as it is.
func requestHeader(in http.Header, injected []header) http.Header {
	out := maps.Clone(in)
	for key, values := range out {
		out[key] = slices.Clone(values)
	}
	rewriteRequestHeader(out, injected)
	return out
}
