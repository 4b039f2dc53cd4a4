package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
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

// TestSlowUpload: while others wait, a slow upload keeps only the memory that it has filled, and no place; one below 8 KiB/s
// over 10 s is given up if they still wait. One that comes, however slowly, is never too late otherwise.
func TestSlowUpload(t *testing.T) {
	const all, small = chunkedPost + "1\r\nx\r\n0\r\n\r\n", "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
	const onePlace = "max_connections = 1"
	type row struct {
		settings string        // tight if empty
		perSec   int           // bytes per second
		seconds  int           // of the upload
		every    time.Duration // not a second, but this
		other    string        // another request, which waits for all of the memory, for some, or for a place
		at       time.Duration // when it comes
		served   time.Duration // and when it is answered
		want     string        // the answer
	}
	inBubbles(t, map[string]row{
		"nobody waits":                          {perSec: 1, seconds: 10, every: 59 * time.Second, want: "200 after 9m50s, last"},
		"someone waits from the start":          {perSec: 1, seconds: 35, other: all, served: 10 * time.Second, want: "408 after 10s, last"},
		"someone waits in the second window":    {perSec: 1, seconds: 35, other: all, at: 13 * time.Second, served: 20 * time.Second, want: "408 after 20s, last"},
		"someone waits, done within the window": {perSec: 1, seconds: 9, other: all, served: 9 * time.Second, want: "200 after 9s, last"},
		"just below the pace":                   {perSec: 8<<10 - 1, seconds: 35, other: all, served: 10 * time.Second, want: "408 after 10s, last"},
		"at the pace":                           {perSec: 8 << 10, seconds: 35, other: all, served: 35 * time.Second, want: "200 after 35s, last"},
		"someone waits for some of the memory":  {perSec: 1, seconds: 35, other: small, served: time.Second, want: "200 after 35s, last"},
		"fast enough for what may come":         {perSec: 60 << 10, seconds: 10, other: small, served: 10 * time.Second, want: "200 after 10s, last"},
		"someone waits for a place":             {settings: onePlace, perSec: 1, seconds: 35, other: small, at: 9500 * time.Millisecond, served: 10 * time.Second, want: "200 after 35s, last"},
	}, func(t *testing.T, row row) {
		r := newRig(t, cmp.Or(row.settings, tight), echo)
		slow := r.dialRaw()
		var wg sync.WaitGroup
		wg.Go(func() {
			slow.send(chunkedPost)
			for range row.seconds {
				time.Sleep(cmp.Or(row.every, time.Second) / 2)
				if slow.send(chunk(strings.Repeat("x", row.perSec))) != nil {
					return
				}
				time.Sleep(cmp.Or(row.every, time.Second) / 2)
			}
			slow.send("0\r\n\r\n")
		})
		if row.other != "" {
			wg.Go(func() {
				time.Sleep(row.at + time.Nanosecond)
				got := r.ask(row.other)
				equal(t, "the other request", fmt.Sprint(got.status, " after ", got.took), fmt.Sprint("200 after ", row.served-row.at-time.Nanosecond))
			})
		}
		got := slow.answer()
		got.expect(t, row.want)
		equal(t, "it says so", strings.Contains(got.body, `"code":"request_timeout"`), got.status == 408)
		slow.Close()
		wg.Wait()
		r.expectErrors()
	})
}

// TestSlowUploadsHoldHalf: of the memory, while others wait. Those that do not fit are given up.
func TestSlowUploadsHoldHalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const fit, size = 1 << 20 / 2 / segmentSize, 2 * segmentSize
		const second, last = (1 << 20 / 2) / size, 1 // those who come in when the first have given back what they can
		r := newRig(t, tight, echo)
		var statuses [600]atomic.Int32
		together(fit+second+last, func(int) {
			c := r.dialRaw()
			defer c.Close()
			go func() {
				c.send(fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", size))
				time.Sleep(5 * time.Second)
				c.send(strings.Repeat("x", size))
			}()
			statuses[c.answer().status].Add(1)
		})
		passed, refused := statuses[200].Load(), statuses[408].Load()
		equal(t, "answered or refused", passed+refused, fit+second+last)
		holds(t, passed >= fit && refused > 0, "%d are answered and %d refused, want %d at least and some", passed, refused, fit)
	})
}

// TestSilentUpload: an upload that stops is given up after timeout_secs and at most an eighth more.
func TestSilentUpload(t *testing.T) {
	const declared = "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
	inBubbles(t, map[string]string{
		"declared": declared + "x", "nothing comes": declared, "chunked": chunkedPost + chunk("x"), "within a chunk": chunkedPost + "ff\r\nx",
	}, func(t *testing.T, sent string) {
		r := newRig(t, "", echo)
		got := r.ask(sent)
		holds(t, got.took >= 60*time.Second && got.took <= 67500*time.Millisecond, "it took %v, want 60 to 67.5s", got.took)
		holds(t, got.status == 408 && got.last && r.dials.Load() == 0, "%+v after %d dials", got, r.dials.Load())
	})
}

// TestBodyRefused: too large, or no HTTP: 400, and nothing reaches the upstream.
func TestBodyRefused(t *testing.T) {
	const mib = 1 << 20
	const refused = "400 after 0s, last"
	declared := func(n int) string { return fmt.Sprintf("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", n) }
	type row struct{ request, want string }
	inBubbles(t, map[string]row{
		"exactly the limit, declared":                   {declared(mib) + strings.Repeat("x", mib), "200 after 0s"},
		"exactly the limit, chunked":                    {chunkedPost + chunk(strings.Repeat("x", mib)) + "0\r\n\r\n", "200 after 0s, last"},
		"one byte more, declared, before it is sent":    {declared(mib + 1), refused},
		"one byte more, chunked, before the chunk ends": {chunkedPost + "200000\r\n" + strings.Repeat("x", mib+1), refused},
		"one byte more, in small chunks":                {chunkedPost + strings.Repeat(chunk(strings.Repeat("x", 1<<10)), 1<<10) + chunk("x"), refused},
		"broken chunks":                                 {chunkedPost + "zz\r\n", refused},
		"empty, chunked":                                {chunkedPost + "0\r\n\r\n", "200 after 0s, last"},
	}, func(t *testing.T, row row) {
		r := newRig(t, tight, echo)
		r.ask(row.request).expect(t, row.want)
		if row.want == refused {
			equal(t, "dials", r.dials.Load(), 0)
			r.expectErrors(typeInvalidRequest)
		} else {
			r.expectErrors()
		}
	})
}

// TestUploadBroken: a client that dies in the middle of its upload is 499.
func TestUploadBroken(t *testing.T) {
	inBubbles(t, map[string]string{
		"declared": "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", "chunked": chunkedPost + "9\r\nx",
	}, func(t *testing.T, sent string) {
		r := newRig(t, "", echo)
		c := r.dialRaw()
		c.send(sent)
		c.Close()
		r.completed().expect(t, "status", 499.0, "attempts", 0.0, "bytes_in", 1.0)
		r.expectErrors()
	})
}

// TestBodyMemory: what a body reserves, and when it gives that back.
func TestBodyMemory(t *testing.T) {
	const mib, declared = 1 << 20, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
	type row struct {
		request     string
		reservation int64
	}
	inBubbles(t, map[string]row{"declared": {declared, 1000}, "chunked": {chunkedPost + "3e8\r\n", mib}}, func(t *testing.T, row row) {
		r := newRig(t, tight, func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			time.Sleep(time.Second)
			http.NewResponseController(w).Flush()
			time.Sleep(time.Second)
		})
		reserved := func(when string, want int64) {
			t.Helper()
			synctest.Wait()
			taken, _ := r.proxy.bodies.budget.load()
			equal(t, "reserved "+when, taken, want)
		}
		c := r.dialRaw()
		c.send(row.request)
		reserved("while uploading", row.reservation)
		c.send(strings.Repeat("x", 1000))
		if row.request != declared {
			c.send("\r\n0\r\n\r\n")
		}
		reserved("while waiting for headers", 1000)
		time.Sleep(1500 * time.Millisecond)
		reserved("while streaming", 0)
		equal(t, "the status", c.answer().status, 200)
	})
}

// TestUploadAnyPieces: whatever pieces a body comes in, every attempt reads exactly it, and little more memory is held.
func TestUploadAnyPieces(t *testing.T) {
	random := rand.NewChaCha8([32]byte{})
	for _, size := range []int{1, 511, 512, 513, 4096, 1<<20 - 1, 1 << 20} {
		content := make([]byte, size)
		random.Read(content)
		for name, pieces := range map[string]func(io.Reader) io.Reader{
			"whole": func(r io.Reader) io.Reader { return r }, "half": iotest.HalfReader, "end with the last byte": iotest.DataErrReader,
		} {
			for _, declared := range []int64{int64(size), -1} {
				what := fmt.Sprintf("%d bytes, %s, declared %d", size, name, declared)
				r := httptest.NewRequest("POST", "/", pieces(bytes.NewReader(content)))
				r.ContentLength = declared
				reader := &bodyLimits{budget: newGate(1 << 20), maxBody: 1 << 20, timeout: time.Minute, crowded: func() bool { return false }}
				reader.budget.tryAcquire(reader.reservation(r))
				b := must(reader.read(bodySource{Request: r}))
				equal(t, what+": read", b.size, int64(size))
				held := 0
				for _, segment := range b.content {
					held += cap(segment)
				}
				holds(t, held <= size+size/4+512, "%s: %d bytes are held", what, held) // size classes round up
				for range 2 {                                                          // attempts
					if size < 5000 { // it reads byte by byte, among others
						equal(t, what, iotest.TestReader(b.open(), content), nil)
					}
					got, err := io.ReadAll(iotest.HalfReader(b.open()))
					holds(t, err == nil && bytes.Equal(got, content), "%s: another attempt reads %d, %v", what, len(got), err)
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
	for name, row := range map[string]struct {
		steps []step
		want  int64 // reserved in the end
	}{
		"no more attempts, both closed":    {steps: []step{older, newest, finish}},
		"closed late":                      {steps: []step{older, finish, newest}},
		"closed twice":                     {steps: []step{older, older, finish, finish, newest, newest}},
		"read to the end counts as closed": {steps: []step{older, finish, whole}},
		"read to the end, then closed":     {steps: []step{older, whole, newest, finish}},
		"still read":                       {steps: []step{older, finish, partial}, want: 4},
		"another attempt may come":         {steps: []step{older, newest}, want: 4},
	} {
		g := newGate(100)
		g.tryAcquire(10)
		b := &requestBody{size: 4, reserved: 10, limits: &bodyLimits{budget: g}, content: [][]byte{[]byte("ab"), []byte("cd")}}
		b.seal()
		older, newest := b.open(), b.open()
		for _, step := range row.steps {
			step(b, older, newest)
		}
		taken, _ := g.load()
		equal(t, name+": reserved in the end", taken, row.want)
		equal(t, name+": the memory is still held", b.content != nil, row.want > 0)
		n, _ := newest.Read(make([]byte, 8))
		holds(t, row.want > 0 || n == 0, "%s: memory that may be another request's by now is still read", name)
	}
}
