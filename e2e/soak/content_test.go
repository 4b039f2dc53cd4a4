package soak

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
)

// content is what a body consists of. Both ends make it from its seed, and so can check each byte, also of a body that broke off.
type content struct {
	form form
	seed uint64
	size int64
	sent int64 // less than size if it breaks off
}

// form is what a content looks like.
type form int

const (
	binaryForm form = iota
	gzipForm        // begins as gzip does, and is none: a proxy that decodes it fails
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
			copy(event, eventBegin+hex.EncodeToString(event[:eventText/2])+eventEnd)
		}
	}
	return all
}

// check returns how got differs from the content, of which it may be a part unless it is whole.
func (c content) check(got []byte, whole bool) error {
	switch {
	case !bytes.HasPrefix(c.bytes(), got):
		return fmt.Errorf("a wrong byte, or one too many, in %d of %d", len(got), c.size)
	case whole && int64(len(got)) != c.size:
		return fmt.Errorf("%d bytes of %d, and yet a clean end", len(got), c.size)
	}
	return nil
}
