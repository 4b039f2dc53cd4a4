package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
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
	eventForm       // server-sent events, of eventSize bytes each
)

const (
	gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"
	eventBegin = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\""
	eventEnd   = "\"}}\n\n"
	eventText  = 96 // hexadecimal digits
	eventSize  = len(eventBegin) + eventText + len(eventEnd)
)

// bytes returns the content.
func (c content) bytes() []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.seed)
	all := make([]byte, c.size)
	rand.NewChaCha8(seed).Read(all) // never fails
	switch c.form {
	case gzipForm:
		copy(all, gzipHeader)
	case eventForm:
		for event := range slices.Chunk(all, eventSize) {
			text := hex.EncodeToString(event[:eventText/2])
			copy(event, eventBegin+text+eventEnd)
		}
	}
	return all
}

// contentType is what an answer of it declares.
func (c content) contentType() string {
	if c.form == eventForm {
		return "text/event-stream; charset=utf-8"
	}
	return "application/octet-stream"
}

// encoding is what an answer of it declares.
func (c content) encoding() string {
	if c.form == gzipForm {
		return "gzip"
	}
	return ""
}

// digest is a body's checksum, as headers and trailers have it.
func digest(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

// A checker compares what is written to it with a body.
type checker struct {
	want  []byte
	n     int   // bytes so far
	wrong error // the first difference
}

// Write never fails, so that the connection is read to its end in any case.
func (c *checker) Write(p []byte) (int, error) {
	if c.wrong == nil && !bytes.HasPrefix(c.want[c.n:], p) {
		c.wrong = fmt.Errorf("a wrong byte, or one too many, between %d and %d of %d", c.n, c.n+len(p), len(c.want))
	}
	c.n += len(p)
	return len(p), nil
}

// whole returns an error unless what was written is all of the body, and this its checksum.
// For a body that broke off there is wrong.
func (c *checker) whole(sum string) error {
	switch {
	case c.wrong != nil:
		return c.wrong
	case c.n != len(c.want):
		return fmt.Errorf("%d bytes of %d, and yet a clean end", c.n, len(c.want))
	case sum != digest(c.want):
		return errors.New("the checksum was lost or changed")
	}
	return nil
}
