//go:build vm

package memory

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
	"anthropic-oauth-proxy/e2e/testca"
)

const mib = 1 << 20

// patience is how long anything may take here that should happen at once.
const patience = 3 * time.Minute

// box is a proxy in a control group with the memory limit of k8s/deployment.yaml, and an API in front of which it stands.
type box struct {
	*testing.T
	*proxytest.Proxy
	group  string
	health string // address of its own endpoints
}

// The API's paths.
const (
	count   = "/count"   // answers with the size of the body
	large   = "/large"   // 8 MiB
	headers = "/headers" // 200 KiB of headers
)

func newBox(t *testing.T) *box {
	b := &box{T: t, group: filepath.Join("/sys/fs/cgroup", t.Name()), health: "127.0.0.1:8081"}
	ca, err := testca.New()
	b.must(err)
	certificate, err := ca.Certificate(nil)
	b.must(err)
	up := httptest.NewUnstartedServer(http.HandlerFunc(b.api))
	up.EnableHTTP2, up.TLS = true, &tls.Config{Certificates: []tls.Certificate{certificate}}
	up.StartTLS()
	t.Cleanup(up.Close)

	b.must(os.Mkdir(b.group, 0o755))
	b.must(os.WriteFile(b.group+"/memory.max", []byte("128M"), 0))
	b.must(os.WriteFile("/tmp/ca.pem", ca.PEM, 0o600))
	const boxed = "/tmp/boxed"
	b.must(os.WriteFile(boxed, fmt.Appendf(nil, "#!/bin/sh\necho $$ >%s/cgroup.procs\nexec proxy \"$@\"\n", b.group), 0o700))
	b.Proxy = proxytest.Launch(t, proxytest.Options{
		Binary: boxed,
		Args:   []string{"-local", "-listen", "127.0.0.1:8080", "-upstream", up.URL},
		Config: fmt.Sprintf("[proxy]\nbody_memory_mb = 32\nhealth_addr = %q\n", b.health),
		Env:    []string{"PATH=/bin", "SSL_CERT_FILE=/tmp/ca.pem", "GOMEMLIMIT=102MiB", "GOMAXPROCS=1", "LOG_LEVEL=warn"}, // but for the last as in k8s/deployment.yaml
	})
	b.must(b.WaitListening(patience))
	t.Cleanup(func() {
		b.Logf("at most %d of 128 MiB", b.memory("peak")/mib)
		if stat, _ := os.ReadFile(b.group + "/memory.events"); !strings.Contains(string(stat), "oom_kill 0") {
			b.Errorf("the kernel says %s", stat)
		}
	})
	return b
}

func (b *box) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// api is the upstream.
func (b *box) api(w http.ResponseWriter, r *http.Request) {
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	switch r.URL.Path {
	case large:
		io.CopyN(w, zeros{}, 8*mib)
		return
	case headers:
		for i := range 20 {
			w.Header().Set(fmt.Sprint("X-", i), strings.Repeat("x", 10<<10))
		}
	}
	fmt.Fprint(w, n)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// memory returns memory.NAME of the group in bytes.
func (b *box) memory(name string) int64 {
	text, err := os.ReadFile(b.group + "/memory." + name)
	if err != nil {
		return -1
	}
	n, _ := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n
}

// dial connects, with a small send buffer: the VM's memory is not without end.
func (b *box) dial() (net.Conn, error) {
	conn, err := net.DialTimeout("tcp", "127.0.0.1:8080", patience)
	if err == nil {
		conn.(*net.TCPConn).SetWriteBuffer(64 << 10)
	}
	return conn, err
}

// dialSend connects and sends text.
func (b *box) dialSend(text string) (net.Conn, error) {
	conn, err := b.dial()
	if err == nil {
		_, err = io.WriteString(conn, text)
	}
	return conn, err
}

// client returns a client that keeps its connections.
func (b *box) client() *http.Client {
	transport := &http.Transport{DisableCompression: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return b.dial() }}
	b.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 10 * time.Minute}
}

// post uploads n bytes and checks the answer.
func (b *box) post(client *http.Client, path string, n int) error {
	resp, err := client.Post(b.URL()+path, "application/json", bytes.NewReader(make([]byte, n)))
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != 200 || string(text) != strconv.Itoa(n)) {
		err = fmt.Errorf("%d, %.200q; want 200, %d", resp.StatusCode, text, n)
	}
	return err
}

// all runs n clients at once to their end. A few of their errors are shown.
func (b *box) all(n int, run func(i int) error) {
	b.Helper()
	var failed atomic.Int32
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			if err := run(i); err != nil && failed.Add(1) <= 5 {
				b.Errorf("client %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if failed.Load() > 0 {
		b.Errorf("%d of %d clients failed", failed.Load(), n)
	}
}
