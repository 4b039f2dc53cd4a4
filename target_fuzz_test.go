package main

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
)

// targetWire takes requests through a whole proxy, from the bytes that a client sends to what an upstream's net/http reads.
type targetWire struct {
	front  *pipeListener
	client *bufio.ReadWriter // nil between connections
	got    chan string       // the target of each request that reached the upstream
}

// newTargetWire starts a proxy in front of an upstream below basePath.
func newTargetWire(f *testing.F, basePath string, http2 bool) *targetWire {
	f.Helper()
	wire := &targetWire{front: newPipeListener(), got: make(chan string, 1)}
	var protocols http.Protocols
	protocols.SetHTTP1(!http2)
	protocols.SetUnencryptedHTTP2(http2)

	back := newPipeListener()
	upstream := &http.Server{Protocols: &protocols, DisableGeneralOptionsHandler: true,
		Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { wire.got <- r.RequestURI })}
	go upstream.Serve(back)

	cfg := testConfig(f, "", overrides{local: true, upstream: "http://127.0.0.1:1" + basePath})
	proxy := newLife(cfg, wire.front, slog.New(slog.DiscardHandler), new(lineWriter))
	transport := proxy.proxy.upstream.pool.transport
	transport.Protocols = &protocols
	transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := back.dial(ctx, network, addr)
		return newUpstreamConn(ctx, conn, cfg.timeout), err
	}
	go proxy.server.Serve(wire.front)
	f.Cleanup(func() {
		proxy.server.Close()
		proxy.proxy.upstream.pool.closeIdle()
		upstream.Close()
	})
	return wire
}

// send sends a request with the target and returns the answer.
func (w *targetWire) send(t *testing.T, target string) *http.Response {
	t.Helper()
	if w.client == nil {
		conn, err := w.front.dial(t.Context(), "", "")
		if err != nil {
			t.Fatal(err)
		}
		w.client = bufio.NewReadWriter(bufio.NewReader(conn), bufio.NewWriter(conn))
	}
	io.WriteString(w.client, "OPTIONS "+target+" HTTP/1.1\r\nHost: proxy\r\n\r\n")
	w.client.Flush() // the answer tells whether it was read
	resp, err := http.ReadResponse(w.client.Reader, nil)
	if err != nil {
		t.Fatalf("%q gets no answer: %v", target, err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		t.Fatalf("%q gets half an answer: %v", target, err)
	}
	if resp.Close {
		w.client = nil
	}
	return resp
}

// FuzzRequestTarget: what the upstream gets is byte for byte what the client sent.
func FuzzRequestTarget(f *testing.F) {
	for _, seed := range []string{
		"/", "/v1/messages?beta=true", "//x", "//a|b", "/a%2Fb", "/?a;b=%zz", "/x?", "*", "http://h/p?q", "/é", `/a\b"c`, "//%41", "//", "/?#", "https://u@h?/",
		"/%68ealth", "/health/", "//health", "/a/../b/./c/..", "/\xff\xfe?\x80", "/http://example.com/", "http://h//a|b?", "http://h", "h:1", "*?", "/%zz", "/\x7f",
	} {
		f.Add(seed)
	}
	const basePath = "/api%2Fv2"
	wires := map[string]*targetWire{
		"HTTP/1.1":                   newTargetWire(f, "", false),
		"HTTP/2":                     newTargetWire(f, "", true),
		"HTTP/1.1 below a base path": newTargetWire(f, basePath, false),
		"HTTP/2 below a base path":   newTargetWire(f, basePath, true),
	}
	f.Fuzz(func(t *testing.T, target string) {
		if strings.ContainsAny(target, " \r\n") {
			return // that ends the target
		}
		want := originForm(target)
		switch path, _, _ := strings.Cut(want, "?"); path {
		case "/health", "/livez", "/metrics":
			return // the proxy's own
		}
		for name, wire := range wires {
			resp := wire.send(t, target)
			if resp.Header.Get(requestIDHeader) == "" {
				continue // net/http refuses it
			}
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s: %q is answered with %s", name, target, resp.Status)
				continue
			}
			want := want
			if want != "*" && strings.Contains(name, "base path") {
				want = basePath + want
			}
			got := <-wire.got
			if strings.HasPrefix(want, "//") {
				// Some of these can be written in the absolute form only, which means the same.
				got = strings.TrimPrefix(got, "http://127.0.0.1:1")
			}
			if got != want {
				t.Errorf("%s: %q is sent as %q, want %q", name, target, got, want)
			}
		}
	})
}

// originForm returns the path and the query of a target, or "*". (RFC 9112, 3.2.2: of the absolute form the
// authority is cut off, and an empty path is "/".)
func originForm(target string) string {
	if strings.HasPrefix(target, "/") || target == "*" {
		return target
	}
	_, rest, _ := strings.Cut(target, "://")
	end := strings.IndexAny(rest, "/?")
	switch {
	case end < 0:
		return "/"
	case rest[end] == '?':
		return "/" + rest[end:]
	default:
		return rest[end:]
	}
}
