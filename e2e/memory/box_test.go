//go:build vm

package memory

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

const mib = 1 << 20

// patience is how long anything may take here that should happen at once.
const patience = 3 * time.Minute

// box is a proxy in a control group with the memory limit of k8s/deployment.yaml, and an API in front of which it stands.
type box struct {
	*testing.T
	*proxytest.Proxy
	held  context.Context // the life of the connections that are held
	letGo func()          // ends it
	late  atomic.Int32    // requests that patiently made again
}

const (
	url    = "http://127.0.0.1:8080"
	health = "127.0.0.1:8081" // the address of its own endpoints
)

// The API's paths.
const (
	count   = "/count"   // answers with the size of the body
	large   = "/large"   // 8 MiB
	headers = "/headers" // 200 KiB of headers
	slow    = "/slow"    // as count, after two seconds
	stream  = "/stream"  // streamEvents, one each half second
)

const (
	event        = "data: {}\n\n"
	streamEvents = 120
)

// newBox starts the proxy. Its log goes into the file, or, without one, where a test that fails shows it.
func newBox(t *testing.T, log ...string) *box {
	b := &box{T: t}
	b.held, b.letGo = context.WithCancel(context.Background())
	up := proxytest.Must(fakeanthropic.Start(fakeanthropic.HTTP2, http.HandlerFunc(api)))(t)
	up.Forget()
	t.Cleanup(func() { up.Close() })
	level, redirect := "warn", ""
	for _, file := range log {
		level, redirect = "info", ">"+file
	}
	b.Proxy = proxytest.Launch(t, proxytest.Options{
		Binary:    "/bin/" + os.Getenv(inVM),
		MemoryMiB: 128,
		Redirect:  redirect,
		Args:      []string{"-local", "-listen", "127.0.0.1:8080", "-upstream", up.URL},
		Config:    fmt.Sprintf("[proxy]\nbody_memory_mb = 24\nhealth_addr = %q\nconnect_timeout_secs = 60\n", health), // on an emulated processor a handshake may take long
		Env:       append(up.Env(), "GOMEMLIMIT=96MiB", "GOMAXPROCS=1", "LOG_LEVEL="+level),                           // but for the last as in k8s/deployment.yaml
	})
	proxytest.Check(t, b.WaitListening(patience))
	t.Cleanup(func() {
		b.letGo()
		b.Logf("at most %d of 128 MiB; %d times a client was too slow, and came again", b.memory("peak")/mib, b.late.Load())
		if events := proxytest.Must(os.ReadFile(b.Group + "/memory.events"))(t); !strings.Contains(string(events), "oom_kill 0") {
			b.Errorf("the kernel says %s", events)
		}
	})
	return b
}

// api is the upstream.
func api(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	switch r.URL.Path {
	case large:
		for range 128 {
			w.Write(block)
		}
		return
	case headers:
		for i := range 20 {
			w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 10<<10))
		}
	case slow:
		time.Sleep(2 * time.Second)
	case stream:
		for range streamEvents {
			fmt.Fprint(w, event)
			http.NewResponseController(w).Flush()
			time.Sleep(500 * time.Millisecond)
		}
		return
	}
	fmt.Fprint(w, n)
}

var block = make([]byte, 64<<10)

// memory returns memory.NAME of the group in bytes.
func (b *box) memory(name string) int {
	text := proxytest.Must(os.ReadFile(b.Group + "/memory." + name))(b.T)
	return proxytest.Must(strconv.Atoi(strings.TrimSpace(string(text))))(b.T)
}

// dial connects, with a small send buffer: the VM's memory is not without end. It sends text.
func (b *box) dial(text string) (*net.TCPConn, error) {
	conn, err := net.DialTimeout("tcp", "127.0.0.1:8080", patience)
	if err != nil {
		return nil, err
	}
	tcp := conn.(*net.TCPConn)
	tcp.SetWriteBuffer(64 << 10)
	io.WriteString(tcp, text) // as far as the proxy takes it
	return tcp, nil
}

// hold opens n connections that send text, and keeps them until letGo. They come one after the other: beside thousands of
// goroutines, on this processor, honest clients would be idle for a second before they speak.
func (b *box) hold(n int, text string) {
	for range n {
		if conn, err := b.dial(text); err == nil {
			context.AfterFunc(b.held, func() { conn.Close() })
		}
	}
}

// stillReader asks for a large answer and reads nothing of it.
func (b *box) stillReader() *net.TCPConn {
	b.Helper()
	conn := proxytest.Must(b.dial("GET " + large + " HTTP/1.1\r\nHost: x\r\n\r\n"))(b.T)
	conn.SetReadBuffer(16 << 10)
	context.AfterFunc(b.held, func() { conn.Close() })
	return conn
}

// answered reads an answer and checks its status.
func answered(conn net.Conn, status int) error {
	conn.SetReadDeadline(time.Now().Add(10 * time.Minute))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != status {
		return fmt.Errorf("%d, %v; want %d", resp.StatusCode, err, status)
	}
	return nil
}

// client returns a client that keeps its connections.
func (b *box) client() *http.Client {
	dial := func(context.Context, string, string) (net.Conn, error) { return b.dial("") }
	transport := &http.Transport{DisableCompression: true, DialContext: dial}
	b.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Minute}
}

// ask sends a request of n bytes, and checks that the answer is whole and this text; empty: any.
func (b *box) ask(client *http.Client, method, url string, n int, text string) error {
	a, err := proxytest.Ask(client, proxytest.Must(http.NewRequest(method, url, bytes.NewReader(make([]byte, n))))(b.T))
	if a.Response != nil && a.StatusCode == http.StatusRequestTimeout {
		return fmt.Errorf("%w: %.200q", errTooSlow, a.Text)
	}
	if err != nil || a.Err != nil || a.StatusCode != 200 || text != "" && a.Text != text {
		return fmt.Errorf("%.200q, %v, %v; want 200, %.200q", a.Text, err, a.Err, text)
	}
	return nil
}

// post uploads n bytes so many times, one after the other, and checks the answers.
func (b *box) post(times int, client *http.Client, path string, n int) (err error) {
	for ; times > 0 && err == nil; times-- {
		err = b.ask(client, "POST", url+path, n, strconv.Itoa(n))
	}
	return err
}

var errTooSlow = errors.New("refused as too slow")

// patiently makes a request, and makes it again when the proxy found its client too slow: on this processor honest clients may
// leave a connection idle for a second before they speak, so that it is closed, or upload less than 8 KiB/s. SDKs come again too.
func (b *box) patiently(request func() error) error {
	for {
		err := request()
		closed := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if !closed && !errors.Is(err, errTooSlow) || b.late.Add(1) > 10 {
			return err
		}
	}
}

// all runs n clients at once to their end.
func (b *box) all(n int, run func(i int) error) {
	b.Helper()
	var clients errgroup.Group
	for i := range n {
		clients.Go(func() error { return run(i) })
	}
	if err := clients.Wait(); err != nil {
		b.Errorf("the first client that failed: %v", err)
	}
}
