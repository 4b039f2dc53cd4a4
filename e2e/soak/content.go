package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"strings"
)

// content is what a body consists of. Both ends make it from its seed, and so can
// check each byte, also of a body that broke off.
type content struct {
	form form
	seed uint64
	size int64
}

// form is what a content looks like.
type form int

const (
	binaryForm form = iota
	gzipForm        // says that it is gzip, and is not: a proxy that decodes it fails
	eventForm       // server-sent events
)

// gzipHeader begins every gzip file.
const gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"

// reader returns the content from its beginning.
func (c content) reader() io.Reader {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.seed)
	source := rand.NewChaCha8(seed)
	var all io.Reader = source
	switch c.form {
	case gzipForm:
		all = io.MultiReader(strings.NewReader(gzipHeader), source)
	case eventForm:
		all = &events{source: source}
	}
	return io.LimitReader(all, c.size)
}

// digest returns the checksum of the whole content.
func (c content) digest() string {
	sum := sha256.New()
	io.Copy(sum, c.reader()) // neither can fail
	return digestOf(sum)
}

// digestOf returns a checksum as the headers and trailers have it.
func digestOf(sum hash.Hash) string { return hex.EncodeToString(sum.Sum(nil)) }

const (
	eventBegin = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\""
	eventEnd   = "\"}}\n\n"
	eventText  = 48 // random bytes in an event, in hex
	eventSize  = len(eventBegin) + 2*eventText + len(eventEnd)
)

// events reads as endless server-sent events of eventSize bytes.
type events struct {
	source io.Reader
	event  []byte
	rest   []byte // of event, not read yet
}

func (e *events) Read(p []byte) (int, error) {
	if len(e.rest) == 0 {
		var text [eventText]byte
		if _, err := io.ReadFull(e.source, text[:]); err != nil {
			return 0, err
		}
		e.event = append(e.event[:0], eventBegin...)
		e.event = hex.AppendEncode(e.event, text[:])
		e.event = append(e.event, eventEnd...)
		e.rest = e.event
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

// checker compares what is written to it with a content. The zero value is no
// checker; see newChecker.
type checker struct {
	content content
	want    io.Reader // what is still to come
	sum     hash.Hash
	n       int64 // bytes so far
	wrong   error // the first difference
	buf     []byte
}

func newChecker(c content) *checker {
	return &checker{content: c, want: c.reader(), sum: sha256.New()}
}

// Write notes the first difference. It never fails, so that the connection is read
// to its end in any case.
func (c *checker) Write(p []byte) (int, error) {
	if len(c.buf) < len(p) {
		c.buf = make([]byte, len(p))
	}
	want := c.buf[:len(p)]
	n, _ := io.ReadFull(c.want, want) // less only at the content's end
	if c.wrong == nil && !bytes.Equal(p, want[:n]) {
		c.wrong = fmt.Errorf("a wrong byte, or one too many, between %d and %d of %d", c.n, c.n+int64(len(p)), c.content.size)
	}
	c.sum.Write(p)
	c.n += int64(len(p))
	return len(p), nil
}

// prefix returns an error unless what was written is a beginning of the content.
func (c *checker) prefix() error { return c.wrong }

// whole returns an error unless what was written is the content, and its checksum
// is what the other end says.
func (c *checker) whole(digest string) error {
	switch got := digestOf(c.sum); {
	case c.wrong != nil:
		return c.wrong
	case c.n != c.content.size:
		return fmt.Errorf("%d bytes of %d, and yet a clean end", c.n, c.content.size)
	case got != digest:
		return fmt.Errorf("checksum %s, want %q", got, digest)
	}
	return nil
}
