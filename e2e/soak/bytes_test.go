package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"testing"
)

// TestWrongBytes puts proxies that do harm between a client and the upstream: the
// one that does none must pass, and every other one be found out.
func TestWrongBytes(t *testing.T) {
	tests := []struct {
		name     string
		request  func(r *httputil.ProxyRequest)
		response func(r *http.Response) error
		wrong    string
	}{
		{name: "none"},
		{name: "a byte of the request", wrong: "reached the upstream with a wrong body", request: func(r *httputil.ProxyRequest) {
			r.Out.Body = altered(r.In.Body, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}},
		{name: "a byte of the answer", wrong: "a wrong byte", response: func(r *http.Response) error {
			r.Body = altered(r.Body, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
			return nil
		}},
		{name: "a clean end too soon", wrong: "declares", response: func(r *http.Response) error {
			r.Body = altered(r.Body, func(b []byte) []byte { return b[:len(b)-1] })
			r.Header.Del("Content-Length")
			r.ContentLength = -1
			return nil
		}},
		{name: "another checksum", wrong: "declares", response: func(r *http.Response) error {
			r.Header.Set(digestHeader, "0")
			return nil
		}},
		{name: "decoded", wrong: "the headers", response: func(r *http.Response) error {
			r.Header.Set("Content-Encoding", "gzip")
			return nil
		}},
		{name: "another request", wrong: "another request", request: func(r *httputil.ProxyRequest) {
			other := find(t, func(p plan) bool { return p.fault == noFault && p.kind == smallPost && p.path != r.In.URL.Path })
			r.Out.URL.Path = other.path
			r.Out.Body = io.NopCloser(other.request.reader())
			r.Out.ContentLength = other.request.size
			r.Out.Header.Set(digestHeader, other.request.digest())
		}},
		{name: "no authorization", wrong: "authorization", request: func(r *httputil.ProxyRequest) { r.Out.Header.Del("Authorization") }},
	}
	p := find(t, func(p plan) bool {
		return p.fault == noFault && p.kind == smallPost && p.declared && !p.chunked && p.number > 100
	})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var found problems
			got := &client{addr: harmful(t, &found, tt.request, tt.response), problems: &found}
			defer got.hangUp()
			r := got.do(p)
			first, n := found.all()
			switch {
			case tt.wrong == "" && (n > 0 || r.status != 200 || !r.whole || r.bytes != p.answer.size):
				t.Errorf("a proxy that does no harm is accused: %q, %v", first, r)
			case tt.wrong != "" && n == 0:
				t.Errorf("not found out: %v", r)
			case tt.wrong != "" && !bytes.Contains([]byte(first[0]), []byte(tt.wrong)):
				t.Errorf("found: %q, want %q", first, tt.wrong)
			}
		})
	}
}

// TestBrokenAnswer shows that a client can tell a broken answer, and checks what came.
func TestBrokenAnswer(t *testing.T) {
	for _, declared := range []bool{true, false} {
		p := find(t, func(p plan) bool {
			return p.fault == upstreamBreaksOff && p.declared == declared && p.answer.size > 1000 && p.at > 100
		})
		for _, harm := range []bool{false, true} {
			t.Run(strconv.FormatBool(declared)+strconv.FormatBool(harm), func(t *testing.T) {
				var found problems
				response := func(r *http.Response) error {
					if harm {
						r.Body = &flipped{ReadCloser: r.Body}
					}
					return nil
				}
				c := &client{addr: harmful(t, &found, nil, response), problems: &found}
				defer c.hangUp()
				r := c.do(p)
				if r.whole || r.left || r.status != 200 || !harm && r.bytes != p.at {
					t.Errorf("%v ended as %v, want a broken answer of %d bytes", p, r, p.at)
				}
				if _, n := found.all(); (n > 0) != harm {
					t.Errorf("%d problems, one is to be there: %v", n, harm)
				}
			})
		}
	}
}

// harmful runs a proxy that changes requests and answers, before an upstream; nil
// changes nothing.
func harmful(t *testing.T, found *problems, request func(*httputil.ProxyRequest), response func(*http.Response) error) string {
	t.Helper()
	up, err := startUpstream(true, testSeed, found)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(up.close)
	target, err := url.Parse(up.server.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{
		Transport: up.server.Client().Transport,
		ErrorLog:  up.server.Config.ErrorLog,
		// At once, or else nothing of a short answer goes out before it breaks off.
		FlushInterval: -1,
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Header.Set("Anthropic-Beta", oauthBeta)
			if request != nil {
				request(r)
			}
		},
		ModifyResponse: response,
	})
	t.Cleanup(proxy.Close)
	return proxy.Listener.Addr().String()
}

// altered returns a body whose content is changed.
func altered(body io.Reader, change func([]byte) []byte) io.ReadCloser {
	all, _ := io.ReadAll(body)
	return io.NopCloser(bytes.NewReader(change(all)))
}

// flipped is a body whose first byte is wrong.
type flipped struct {
	io.ReadCloser
	done bool
}

func (f *flipped) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if n > 0 && !f.done {
		p[0] ^= 1
		f.done = true
	}
	return n, err
}
