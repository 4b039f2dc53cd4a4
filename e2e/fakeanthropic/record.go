package fakeanthropic

import (
	"bytes"
	"io"
	"net/http"
	"sync"
)

// bodyKept is how much of a body a Request holds, enough for any JSON that a test wants to look into.
const bodyKept = 64 << 10

// A Request is what the server saw of one request so far.
type Request struct {
	*http.Request
	Body []byte // the first 64 KiB that the handler read
}

// A record grows while its request is served.
type record struct {
	io.ReadCloser // the request's body

	mu  sync.Mutex
	req Request
}

// newRecord records r, whose headers handlers may change.
func newRecord(r *http.Request) *record {
	rec := &record{ReadCloser: r.Body, req: Request{Request: r.Clone(r.Context())}}
	r.Body = rec
	return rec
}

func (r *record) snapshot() Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	req := r.req
	req.Body = bytes.Clone(req.Body)
	return req
}

// Read notes what the handler reads of the body.
func (r *record) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.req.Body = append(r.req.Body, p[:min(n, bodyKept-len(r.req.Body))]...)
	return n, err
}
