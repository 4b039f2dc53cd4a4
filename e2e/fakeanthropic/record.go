package fakeanthropic

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
	"net/http"
	"sync"
	"time"
)

// bodyKept is how much of a body a Request holds, enough for any JSON that a test
// wants to look into; longer ones are known by their length and hash.
const bodyKept = 64 << 10

// A Request is what the server saw of one request so far.
type Request struct {
	Index      int // 0 for the first that arrived
	Method     string
	RequestURI string // exactly as it stood in the request
	Proto      string // HTTP/1.1 or HTTP/2.0
	Host       string
	Header     http.Header
	Trailer    http.Header
	// ContentLength is the declared length, -1 without one.
	ContentLength int64
	RemoteAddr    string

	Body       []byte // the first 64 KiB that the handler read
	BodyLen    int64  // how much the handler read
	BodySHA256 string // of all that the handler read, in hex

	Started   time.Time
	Cancelled time.Time // when the client left before the answer was finished, else zero
	Ended     time.Time // when the handler was done, zero while it is not
}

// A record grows while its request is served.
type record struct {
	mu   sync.Mutex
	req  Request
	sum  hash.Hash
	orig *http.Request
}

func newRecord(r *http.Request) *record {
	rec := &record{sum: sha256.New(), orig: r}
	rec.req = Request{
		Method:        r.Method,
		RequestURI:    r.RequestURI,
		Proto:         r.Proto,
		Host:          r.Host,
		Header:        r.Header.Clone(), // handlers may change theirs
		ContentLength: r.ContentLength,
		RemoteAddr:    r.RemoteAddr,
		Started:       time.Now(),
	}
	r.Body = &recordedBody{r.Body, rec}
	return rec
}

// cancelled notes the time; only the first call counts.
func (r *record) cancelled() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.req.Cancelled.IsZero() {
		r.req.Cancelled = time.Now()
	}
}

// ended also notes the trailers, which are complete only after the body.
func (r *record) ended() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.req.Ended = time.Now()
	r.req.Trailer = r.orig.Trailer.Clone()
}

func (r *record) snapshot(index int) Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	req := r.req
	req.Index = index
	req.BodySHA256 = hex.EncodeToString(r.sum.Sum(nil))
	return req
}

// recordedBody notes what the handler reads from a body.
type recordedBody struct {
	io.ReadCloser
	rec *record
}

func (b *recordedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.rec.mu.Lock()
	defer b.rec.mu.Unlock()
	b.rec.sum.Write(p[:n])
	b.rec.req.BodyLen += int64(n)
	room := bodyKept - len(b.rec.req.Body)
	b.rec.req.Body = append(b.rec.req.Body, p[:min(n, room)]...)
	return n, err
}
