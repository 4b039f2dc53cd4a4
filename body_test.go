package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// chunk frames text for a chunked body.
func chunk(text string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(text), text) }

// chunkedPost begins a request of undeclared length.
const chunkedPost = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

// tight leaves memory for one body of undeclared length.
const tight = "max_body_mb = 1\nbody_memory_mb = 1"

// TestSlowUpload: an upload below 8 KiB/s over 10 s is given up, but only while others wait for its memory.
func TestSlowUpload(t *testing.T) {
	for _, row := range []struct {
		name    string
		perSec  int           // bytes per second
		seconds int           // of the upload
		other   time.Duration // when another request comes for the memory; negative: never
		status  int
		took    time.Duration // to the answer
	}{
		{name: "nobody waits", perSec: 1, seconds: 35, other: -1, status: 200, took: 35 * time.Second},
		{name: "someone waits from the start", perSec: 1, seconds: 35, other: time.Millisecond, status: 408, took: 10 * time.Second},
		{name: "someone waits before the window ends", perSec: 1, seconds: 35, other: 9 * time.Second, status: 408, took: 10 * time.Second},
		{name: "someone waits in the second window", perSec: 1, seconds: 35, other: 13 * time.Second, status: 408, took: 20 * time.Second},
		{name: "someone waits, done within the window", perSec: 1, seconds: 9, other: time.Millisecond, status: 200, took: 9 * time.Second},
		{name: "just below the pace", perSec: 8<<10 - 1, seconds: 35, other: time.Millisecond, status: 408, took: 10 * time.Second},
		{name: "at the pace", perSec: 8 << 10, seconds: 35, other: time.Millisecond, status: 200, took: 35 * time.Second},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, tight, echo)
				slow := r.dialRaw()
				var wg sync.WaitGroup
				wg.Go(func() {
					slow.send(chunkedPost)
					for range row.seconds {
						time.Sleep(500 * time.Millisecond)
						if slow.send(chunk(strings.Repeat("x", row.perSec))) != nil {
							return
						}
						time.Sleep(500 * time.Millisecond)
					}
					slow.send("0\r\n\r\n")
				})
				if row.other >= 0 {
					wg.Go(func() {
						time.Sleep(row.other)
						if got := r.post(); got.status != 200 || got.took != row.took-row.other {
							t.Errorf("the other request: %+v, want it served after %v", got, row.took-row.other)
						}
					})
				}
				got := slow.answer()
				if got.status != row.status || got.took != row.took || !got.last {
					t.Errorf("%d after %v, want %d after %v", got.status, got.took, row.status, row.took)
				}
				if row.status == 408 && !strings.Contains(got.body, `"code":"request_timeout"`) {
					t.Errorf("the body is %s", got.body)
				}
				slow.Close()
				wg.Wait()
				if counts := r.proxy.errorCounts(); len(counts) > 0 {
					t.Errorf("errors %v", counts)
				}
				if taken, _ := r.proxy.bodies.budget.load(); taken != 0 {
					t.Errorf("%d bytes are still reserved", taken)
				}
			})
		})
	}
}

// TestSilentUpload: an upload that stops is given up after timeout_secs and at most an eighth more.
func TestSilentUpload(t *testing.T) {
	for _, row := range []struct {
		name string
		sent string
		body string
	}{
		{name: "declared", sent: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n", body: "x"},
		{name: "declared, nothing comes", sent: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"},
		{name: "chunked", sent: chunkedPost, body: chunk("x")},
		{name: "within a chunk", sent: chunkedPost, body: "ff\r\nx"},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", echo)
				c := r.dialRaw()
				go c.send(row.sent + row.body)
				got := c.answer()
				if got.status != 408 || got.took < 60*time.Second || got.took > 67500*time.Millisecond || !got.last {
					t.Errorf("%d after %v, want 408 after 60 to 67.5s", got.status, got.took)
				}
				t.Logf("408 after %v", got.took)
				if r.dials.Load() > 0 {
					t.Error("the upstream was dialled")
				}
			})
		})
	}
}

// TestSteadyUpload: a body that comes slowly, but comes, is never too late.
func TestSteadyUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, "", echo)
		c := r.dialRaw()
		go func() {
			c.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
			for i := range 10 {
				time.Sleep(59 * time.Second)
				c.send(fmt.Sprint(i))
			}
		}()
		if got := c.answer(); got.status != 200 || got.body != "0123456789" || got.took != 590*time.Second {
			t.Errorf("%+v", got)
		}
	})
}

// TestBodyRefused: too large, or no HTTP: 400, and nothing reaches the upstream.
func TestBodyRefused(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct {
		name    string
		request string
		status  int
		errors  map[errorType]uint64
	}{
		{name: "exactly the limit, declared", request: fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", mib, strings.Repeat("x", mib)), status: 200},
		{name: "exactly the limit, chunked", request: chunkedPost + chunk(strings.Repeat("x", mib)) + "0\r\n\r\n", status: 200},
		{name: "one byte more, declared, before it is sent", request: fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", mib+1), status: 400, errors: map[errorType]uint64{typeInvalidRequest: 1}},
		{name: "one byte more, chunked, before the chunk ends", request: chunkedPost + "200000\r\n" + strings.Repeat("x", mib+1), status: 400, errors: map[errorType]uint64{typeInvalidRequest: 1}},
		{name: "one byte more, in small chunks", request: chunkedPost + strings.Repeat(chunk(strings.Repeat("x", 1<<10)), 1<<10) + chunk("x"), status: 400, errors: map[errorType]uint64{typeInvalidRequest: 1}},
		{name: "broken chunks", request: chunkedPost + "zz\r\n", status: 400, errors: map[errorType]uint64{typeInvalidRequest: 1}},
		{name: "chunk without its end", request: chunkedPost + "1\r\nxy0\r\n\r\n", status: 400, errors: map[errorType]uint64{typeInvalidRequest: 1}},
		{name: "empty, chunked", request: chunkedPost + "0\r\n\r\n", status: 200},
		{name: "trailers are dropped", request: chunkedPost + chunk("x") + "0\r\nX-Trailer: 1\r\n\r\n", status: 200},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var trailer http.Header
				r := newRig(t, tight, func(w http.ResponseWriter, r *http.Request) {
					echo(w, r)
					trailer = r.Trailer
				})
				c := r.dialRaw()
				go c.send(row.request)
				got := c.answer()
				if got.status != row.status || got.took != 0 {
					t.Errorf("%d after %v, want %d at once", got.status, got.took, row.status)
				}
				if row.status == 400 && (!got.last || r.dials.Load() > 0) {
					t.Errorf("the connection is closed: %t; dials: %d", got.last, r.dials.Load())
				}
				if counts := r.proxy.errorCounts(); !maps.Equal(counts, row.errors) {
					t.Errorf("errors %v, want %v", counts, row.errors)
				}
				if len(trailer) > 0 {
					t.Errorf("the upstream got the trailers %v", trailer)
				}
			})
		})
	}
}

// TestUploadBroken: a client that dies in the middle of its upload is 499.
func TestUploadBroken(t *testing.T) {
	for name, sent := range map[string]string{"declared": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", "chunked": chunkedPost + "9\r\nx"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, "", echo)
				c := r.dialRaw()
				c.send(sent)
				c.Close()
				synctest.Wait()
				if line := r.log.one(t, "request completed"); line["status"] != 499.0 || line["attempts"] != 0.0 || line["bytes_in"] != 1.0 {
					t.Errorf("%v", line)
				}
				if counts := r.proxy.errorCounts(); len(counts) > 0 {
					t.Errorf("errors %v", counts)
				}
			})
		})
	}
}

// TestBodyMemory: what a body reserves, and when it gives that back.
func TestBodyMemory(t *testing.T) {
	const mib = 1 << 20
	for _, row := range []struct {
		name      string
		request   string
		uploading int64 // reserved until the body is there
		sending   int64 // until the headers are in
	}{
		{name: "declared", request: "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", uploading: 1000, sending: 1000},
		{name: "chunked", request: chunkedPost + "3e8\r\n", uploading: mib, sending: 1000},
	} {
		t.Run(row.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, tight, func(w http.ResponseWriter, r *http.Request) {
					io.Copy(io.Discard, r.Body)
					time.Sleep(time.Second)
					http.NewResponseController(w).Flush()
					time.Sleep(time.Second)
				})
				reserved := func(when string, want int64) {
					t.Helper()
					synctest.Wait()
					if taken, _ := r.proxy.bodies.budget.load(); taken != want {
						t.Errorf("%s: %d bytes are reserved, want %d", when, taken, want)
					}
				}
				c := r.dialRaw()
				c.send(row.request)
				reserved("while uploading", row.uploading)
				c.send(strings.Repeat("x", 1000))
				if strings.Contains(row.request, "chunked") {
					c.send("\r\n0\r\n\r\n")
				}
				reserved("while waiting for headers", row.sending)
				time.Sleep(1500 * time.Millisecond)
				reserved("while streaming", 0)
				if got := c.answer(); got.status != 200 {
					t.Errorf("%+v", got)
				}
			})
		})
	}
}

// uploaded runs a body through a reader that allows limit bytes, and returns what is kept of it.
func uploaded(t testing.TB, content io.Reader, declared, limit int64) (*requestBody, error) {
	t.Helper()
	r := httptest.NewRequest("POST", "/", content)
	r.ContentLength = declared
	reader := &bodyReader{budget: newGate(limit), largest: limit, timeout: time.Minute, crowded: func() bool { return false }}
	reader.budget.tryAcquire(reader.reservation(r))
	return reader.read(r, nil)
}

// TestUploadAnyPieces: whatever pieces a body comes in, every attempt reads exactly it, and little more memory is held.
func TestUploadAnyPieces(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{1, 511, 512, 513, 4096, 1<<20 - 1, 1 << 20} {
		content := make([]byte, size)
		for i := range content {
			content[i] = byte(random.Uint32())
		}
		for name, pieces := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "half": iotest.HalfReader, "end with the last byte": iotest.DataErrReader,
		} {
			for _, declared := range []int64{int64(size), -1} {
				b, err := uploaded(t, pieces(bytes.NewReader(content)), declared, 1<<20)
				if err != nil || b.size != int64(size) {
					t.Fatalf("%d bytes, %s: %d were read, %v", size, name, b.size, err)
				}
				if held := cap(b.content); held > size+bytes.MinRead+size/8 { // size classes round up
					t.Errorf("%d bytes, %s, declared %d: %d bytes are held", size, name, declared, held)
				}
				for range 2 { // attempts
					if size < 5000 { // it reads byte by byte, among others
						if err := iotest.TestReader(b.open(), content); err != nil {
							t.Errorf("%d bytes, %s: %v", size, name, err)
						}
					}
					got, err := io.ReadAll(iotest.HalfReader(b.open()))
					if err != nil || !bytes.Equal(got, content) {
						t.Errorf("%d bytes, %s: another attempt reads %d, %v", size, name, len(got), err)
					}
				}
			}
		}
	}
}

// TestRequestBodyReleases: the reservation goes back exactly once, when nothing can need it any more.
func TestRequestBodyReleases(t *testing.T) {
	type step func(b *requestBody, older, newest io.ReadCloser)
	var (
		finish  = func(b *requestBody, _, _ io.ReadCloser) { b.finish() }
		older   = func(_ *requestBody, r, _ io.ReadCloser) { r.Close() }
		newest  = func(_ *requestBody, _, r io.ReadCloser) { r.Close() }
		whole   = func(_ *requestBody, _, r io.ReadCloser) { io.Copy(io.Discard, r) }
		partial = func(_ *requestBody, _, r io.ReadCloser) { r.Read(make([]byte, 2)) }
	)
	for _, row := range []struct {
		name  string
		steps []step
		want  int64 // reserved in the end
	}{
		{name: "no more attempts, both closed", steps: []step{older, newest, finish}},
		{name: "closed late", steps: []step{older, finish, newest}},
		{name: "closed twice", steps: []step{older, older, finish, finish, newest, newest}},
		{name: "read to the end counts as closed", steps: []step{older, finish, whole}},
		{name: "read to the end, then closed", steps: []step{older, whole, newest, finish}},
		{name: "still read", steps: []step{older, finish, partial}, want: 4},
		{name: "another attempt may come", steps: []step{older, newest}, want: 4},
	} {
		t.Run(row.name, func(t *testing.T) {
			g := newGate(100)
			g.tryAcquire(10)
			b := &requestBody{size: 4, reserved: 10, budget: g}
			b.keep([]byte("abcd"))
			older, newest := b.open(), b.open()
			for _, step := range row.steps {
				step(b, older, newest)
			}
			if taken, _ := g.load(); taken != row.want {
				t.Errorf("%d bytes are reserved in the end, want %d", taken, row.want)
			}
			if row.want == 0 && b.content != nil {
				t.Error("the memory is still held")
			}
		})
	}
}

// TestVerdict: what the error that ended an upload means.
func TestVerdict(t *testing.T) {
	for _, row := range []struct {
		name string
		err  error
		gave *failure // why the guard has ended the upload
		want *failure
	}{
		{name: "slow", err: os.ErrDeadlineExceeded, gave: errSlowUpload, want: errSlowUpload},
		{name: "silent", err: os.ErrDeadlineExceeded, gave: errSilentUpload, want: errSilentUpload},
		{name: "cut off", err: io.ErrUnexpectedEOF, want: errClientGone},
		{name: "no HTTP", err: errors.New("invalid byte in chunk length"), want: errMalformedBody},
	} {
		t.Run(row.name, func(t *testing.T) {
			var guard uploadGuard
			guard.failed.Store(row.gave)
			if got := asFailure(guard.verdict(t.Context(), row.err)); got != row.want {
				t.Errorf("%v, want %v", got, row.want)
			}
		})
	}
}
