package main

import (
	"bufio"
	"io"
	"net/http/httputil"
	"time"
)

// upload sends the request of p, as far as its fault lets it.
func (c *client) upload(p plan) error {
	out := bufio.NewWriter(c.conn)
	header(out, p, c.addr)
	if p.request.size > 0 && p.fault != clientSendsTwoLengths { // that is refused for its headers
		if err := c.uploadBody(out, p); err != nil {
			return err
		}
	}
	return out.Flush()
}

// uploadBody sends the body of p's request.
func (c *client) uploadBody(out *bufio.Writer, p plan) error {
	body, to := p.request.reader(), io.Writer(out)
	var chunks io.WriteCloser
	if p.chunked {
		chunks = httputil.NewChunkedWriter(out)
		to = chunks
	}
	switch p.fault {
	case clientLeavesUploading, clientFallsSilent, clientSendsBadChunk:
		if _, err := io.CopyN(to, body, p.at); err != nil {
			return err
		}
		if p.fault == clientSendsBadChunk {
			io.WriteString(out, "not a size\r\n") // Flush tells of a failure
		}
		return out.Flush()
	case clientSendsTooMuch:
		if !p.chunked { // that is refused for its length
			return nil
		}
	case clientSendsSlowly:
		if err := sendSlowly(out, to, body, p); err != nil {
			return err
		}
	}
	if _, err := io.Copy(to, body); err != nil || chunks == nil {
		return err
	}
	if err := chunks.Close(); err != nil {
		return err
	}
	_, err := io.WriteString(out, "\r\n") // the end of the trailers, of which there are none
	return err
}

// sendSlowly sends all but the last of the body's pieces, with a pause behind each.
func sendSlowly(out *bufio.Writer, to io.Writer, body io.Reader, p plan) error {
	for range slowPieces - 1 {
		if _, err := io.CopyN(to, body, p.request.size/slowPieces); err != nil {
			return err
		}
		if err := out.Flush(); err != nil {
			return err
		}
		time.Sleep(p.pause)
	}
	return nil
}
