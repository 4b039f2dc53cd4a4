package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

// read reads the answer to p's request into got and checks it. A broken answer is
// no error: what may break is known only to the log.
func (c *client) read(p plan, got *result) error {
	resp, err := http.ReadResponse(c.in, &http.Request{Method: p.method})
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	defer resp.Body.Close()
	got.status, got.proxyID = resp.StatusCode, resp.Header.Get("X-Proxy-Request-Id")
	number, passed := answerTo(resp.Header.Get("Request-Id"))
	switch {
	case p.kind == ownEndpoint:
		err = got.readOwn(p, resp)
	case p.fault == clientSendsTwoLengths:
		err = got.readRefusal(resp)
	case passed && number != p.number:
		err = fmt.Errorf("the answer is that to another request, %d", number)
	case passed:
		err = c.readUpstream(p, got, resp)
	default:
		err = got.readError(resp)
	}
	if err != nil || got.left || !got.whole {
		return err
	}
	return c.keep(p, resp)
}

// keep keeps the connection for the next request, or not, as the proxy says.
func (c *client) keep(p plan, resp *http.Response) error {
	if resp.Close {
		c.hangUp()
		return nil
	}
	if n := c.in.Buffered(); n > 0 {
		return fmt.Errorf("%d bytes behind the answer, which nobody asked for", n)
	}
	if p.chunked {
		return errors.New("the connection is kept after chunks, which may hide a second request")
	}
	return nil
}

// readUpstream reads an answer of the upstream's.
func (c *client) readUpstream(p plan, got *result, resp *http.Response) error {
	if err := checkHeader(p, resp); err != nil {
		return err
	}
	body := newChecker(p.answer)
	if p.fault == clientLeavesReading {
		io.CopyN(body, resp.Body, p.at) // an answer that breaks off is noticed by what is missing
		got.left, got.bytes = true, body.n
		if p.reset {
			resetOnClose(c.conn)
		}
		c.hangUp() // before the body is closed, which would read the rest
		return body.prefix()
	}
	_, broken := io.Copy(body, resp.Body)
	got.bytes = body.n
	switch {
	case broken != nil:
		return body.prefix()
	case p.method == http.MethodHead:
		got.whole = true
		return nil
	}
	digest := resp.Header.Get(digestHeader)
	if !p.declared {
		digest = resp.Trailer.Get(digestHeader)
	}
	got.whole = true
	return body.whole(digest)
}

// checkHeader checks the headers of an answer of the upstream's.
func checkHeader(p plan, resp *http.Response) error {
	encoding := resp.Header.Get("Content-Encoding")
	declared, digest := int64(-1), ""
	if p.declared {
		declared, digest = p.answer.size, p.answer.digest()
	}
	switch {
	case resp.Header.Get("Content-Type") != p.contentType(), (encoding == "gzip") != (p.answer.form == gzipForm):
		return fmt.Errorf("the answer has the headers %v", resp.Header)
	case resp.ContentLength != declared, resp.Header.Get(digestHeader) != digest:
		return fmt.Errorf("the answer declares %d bytes and checksum %q, want %d and %q",
			resp.ContentLength, resp.Header.Get(digestHeader), declared, digest)
	}
	return nil
}

// readError reads an answer of the proxy's own.
func (got *result) readError(resp *http.Response) error {
	raw, err := io.ReadAll(resp.Body)
	var body struct {
		Type      string
		RequestID string `json:"request_id"`
		Error     struct{ Type, Code, Message string }
	}
	if resp.Request.Method == http.MethodHead { // there is no body to read: the code is the log's to tell
		got.whole = err == nil
		return err
	}
	if err == nil {
		err = json.Unmarshal(raw, &body)
	}
	if err != nil {
		return fmt.Errorf("an error of the proxy's, status %d, is not whole: %w", resp.StatusCode, err)
	}
	if body.Type != "error" || body.Error.Type != "proxy_error" || body.Error.Code == "" || body.Error.Message == "" ||
		body.RequestID != got.proxyID {
		return fmt.Errorf("an error of the proxy's, status %d, for request id %s, is %.300q", resp.StatusCode, got.proxyID, raw)
	}
	got.code, got.whole = body.Error.Code, true
	return nil
}

// shows is what the endpoints of the proxy's own say.
var shows = map[string]string{
	"/health":  `"status":"healthy"`,
	"/livez":   `"status":"alive"`,
	"/metrics": "\nproxy_requests_in_flight ",
}

// readOwn reads the answer of an endpoint of the proxy's own.
func (got *result) readOwn(p plan, resp *http.Response) error {
	raw, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(raw), shows[p.path]) || got.proxyID == "" {
		return fmt.Errorf("%s: status %d, %v, id %q: %.300q", p.path, resp.StatusCode, err, got.proxyID, raw)
	}
	got.whole = true
	return nil
}

// readRefusal reads what net/http says of a request that it can't read.
func (got *result) readRefusal(resp *http.Response) error {
	if resp.StatusCode != http.StatusBadRequest || !resp.Close || got.proxyID != "" {
		return errors.New("an ambiguous request is answered with status " + strconv.Itoa(resp.StatusCode))
	}
	got.whole = true
	return nil
}
