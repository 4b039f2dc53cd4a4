package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// HTTP/1.1 once more, written from RFC 9112 and not from net/http: how a request reads that a client has sent, and how
// strict one has to be that the proxy sends.

// wireRequest is a request as it stands on a connection.
type wireRequest struct {
	method, target string
	header         map[string][]string // names in small letters
	body           string
	lax            bool // not quite HTTP, or hardly in use: the proxy may refuse it
	last           bool // the connection must be closed after it
}

// String implements fmt.Stringer.
func (r wireRequest) String() string {
	return fmt.Sprintf("%s %q with headers %q and body %q", r.method, r.target, r.header, r.body)
}

// own reports whether the proxy answers r itself.
func (r *wireRequest) own() bool {
	path, _, _ := strings.Cut(originForm(r.target), "?")
	return path == "/health" || path == "/livez" || path == "/metrics"
}

// forwarded reports whether r is to reach the upstream.
func (r *wireRequest) forwarded() bool { return r.method != http.MethodConnect && !r.own() }

var (
	token       = "[!#$%&'*+.^_`|~0-9A-Za-z-]+"
	requestLine = regexp.MustCompile(`^(` + token + `) ([^\x00-\x20\x7f]*) HTTP/1\.([0-9])$`)
	fieldLine   = regexp.MustCompile(`^(` + token + `):([^\x00-\x08\x0a-\x1f\x7f]*)$`)
	foldedLine  = regexp.MustCompile(`^[ \t][^\x00-\x08\x0a-\x1f\x7f]*$`)
	digits      = regexp.MustCompile(`^[0-9]+$`)
	// With extensions, which are of no use to anyone.
	chunkLine = regexp.MustCompile(`^([0-9A-Fa-f]{1,16})([ \t]*(;[^\r]*)?)$`)
	// Targets and hosts that nobody may refuse.
	plainTarget = regexp.MustCompile(`^(http://[0-9A-Za-z.-]+(:[0-9]+)?)?/([!$&'()*+,./:;=?@_~0-9A-Za-z-]|%[0-9A-Fa-f]{2})*$`)
	plainHost   = regexp.MustCompile(`^[0-9A-Za-z.-]+(:[0-9]+)?$`)
)

// readArrived reads a request as strictly as one can, so that no other reader can see another one: lines that end in
// CRLF, one Host, one length at most and no transfer coding, no header that ends at the proxy, and no byte behind it.
// io.EOF says that there is none.
func readArrived(reader *bufio.Reader) (r wireRequest, err error) {
	if _, err := reader.Peek(1); err == io.EOF {
		return r, err
	}
	line, err := readArrivedLine(reader)
	m := requestLine.FindStringSubmatch(line)
	if err != nil || m == nil || m[2] == "" || m[3] != "1" {
		return r, fmt.Errorf("the request line %q (%v)", line, err)
	}
	r = wireRequest{method: m[1], target: m[2], header: map[string][]string{}}
	for {
		line, err := readArrivedLine(reader)
		if line == "" && err == nil {
			return r, r.readArrivedBody(reader)
		}
		m := fieldLine.FindStringSubmatch(line)
		if err != nil || m == nil || m[2] != " "+strings.Trim(m[2], " \t") {
			return r, fmt.Errorf("the header line %q (%v)", line, err)
		}
		name := strings.ToLower(m[1])
		r.header[name] = append(r.header[name], m[2][1:])
	}
}

// readArrivedLine reads a line without its CRLF.
func readArrivedLine(reader *bufio.Reader) (string, error) {
	text, err := reader.ReadString('\n')
	line, ok := strings.CutSuffix(text, "\r\n")
	if err == nil && !ok {
		err = errors.New("without CRLF")
	}
	return line, err
}

// readArrivedBody reads r's body, and takes the headers for it, and Host, from r.
func (r *wireRequest) readArrivedBody(reader *bufio.Reader) error {
	host, lengths := r.header["host"], r.header["content-length"]
	delete(r.header, "host")
	delete(r.header, "content-length")
	for name := range r.header {
		if endsHere.MatchString(name) || clientsEndHere.MatchString(name) {
			return fmt.Errorf("the header %q, which ends at the proxy", name)
		}
	}
	if !slices.Equal(host, []string{"127.0.0.1:1"}) || len(lengths) > 1 {
		return fmt.Errorf("hosts %q and lengths %q", host, lengths)
	}
	if len(lengths) == 1 {
		size, err := strconv.Atoi(lengths[0])
		if err != nil || strconv.Itoa(size) != lengths[0] || size < 0 {
			return fmt.Errorf("the length %q", lengths[0])
		}
		body := make([]byte, size)
		if n, err := io.ReadFull(reader, body); err != nil {
			return fmt.Errorf("%d bytes of a body of %d", n, size)
		}
		r.body = string(body)
	}
	if n := reader.Buffered(); n > 0 {
		return fmt.Errorf("%d bytes behind a request that was not answered yet", n)
	}
	return nil
}

// sentReader reads what a client has sent. It is as strict as RFC 9112 lets a server be, except that it takes what
// net/http takes too: lines that end in LF (2.2), folded header lines (5.2) and equal lengths twice (RFC 9110, 8.6), as
// the RFC allows; after a POST, of which old clients send more than they say (2.2), up to four CR and LF; and CONNECT
// without a target, which is refused like any other.
type sentReader struct {
	rest string
	lax  bool // one of those was met
}

// readSent returns the requests that are valid and complete, up to the first that is not, or the last of its connection.
func readSent(sent string) (requests []wireRequest) {
	s := &sentReader{rest: sent}
	for {
		s.lax = false
		if n := len(requests); n > 0 && requests[n-1].method == http.MethodPost {
			head := s.rest[:min(4, len(s.rest))]
			skipped := len(head) - len(strings.TrimLeft(head, "\r\n"))
			s.rest, s.lax = s.rest[skipped:], skipped > 0
		}
		r, ok := s.request()
		if !ok {
			return requests
		}
		requests = append(requests, r)
		if r.last {
			return requests
		}
	}
}

// line reads a line. ok is false if it has no end.
func (s *sentReader) line() (line string, ok bool) {
	line, s.rest, ok = strings.Cut(s.rest, "\n")
	line, crlf := strings.CutSuffix(line, "\r")
	s.lax = s.lax || !crlf
	return line, ok
}

// request reads a request; ok is false if it is not valid, or not complete.
func (s *sentReader) request() (r wireRequest, ok bool) {
	line, ok := s.line()
	m := requestLine.FindStringSubmatch(line)
	if !ok || m == nil || m[2] == "" && m[1] != http.MethodConnect {
		return r, false
	}
	r = wireRequest{method: m[1], target: m[2]}
	if r.header, ok = s.fields(); !ok {
		return r, false
	}
	hosts, old := r.header["host"], m[3] == "0"
	switch {
	case len(hosts) > 1, len(hosts) == 0 && !old && r.method != http.MethodConnect:
		return r, false
	case len(hosts) == 1 && !plainHost.MatchString(hosts[0]), !r.plainTarget():
		s.lax = true
	}
	if expect := r.header["expect"]; len(expect) > 0 && !strings.EqualFold(expect[0], "100-continue") {
		s.lax = true
	}
	// HTTP/1.0 does not outlive an answer here.
	r.last = old || slices.Contains(elements(strings.ToLower(strings.Join(r.header["connection"], ","))), "close")
	ok = s.body(&r, old)
	r.lax = s.lax
	return r, ok
}

// plainTarget reports whether r's target is one that nobody may refuse.
func (r *wireRequest) plainTarget() bool {
	switch {
	case r.method == http.MethodConnect:
		return plainHost.MatchString(r.target)
	case r.target == "*":
		return r.method == http.MethodOptions
	default:
		return plainTarget.MatchString(r.target)
	}
}

// fields reads header lines and the empty one behind them.
func (s *sentReader) fields() (header map[string][]string, ok bool) {
	header = map[string][]string{}
	for name := ""; ; {
		line, ok := s.line()
		switch m := fieldLine.FindStringSubmatch(line); {
		case !ok:
			return nil, false
		case line == "":
			for _, values := range header {
				for i := range values {
					values[i] = strings.Trim(values[i], " \t")
				}
			}
			return header, true
		case m != nil:
			name = strings.ToLower(m[1])
			header[name] = append(header[name], strings.Trim(m[2], " \t"))
		case name != "" && foldedLine.MatchString(line):
			header[name][len(header[name])-1] += " " + strings.Trim(line, " \t")
			s.lax = true
		default:
			return nil, false
		}
	}
}

// body reads r's body (RFC 9112, 6.3). old says that r is HTTP/1.0, which has no transfer codings: one that names
// them is in error about its end, and its connection must be closed (6.1).
func (s *sentReader) body(r *wireRequest, old bool) (ok bool) {
	size := 0
	if lengths := r.header["content-length"]; len(lengths) > 0 {
		for _, length := range lengths {
			if length != lengths[0] || !digits.MatchString(length) {
				return false
			}
		}
		n, err := strconv.ParseInt(lengths[0], 10, 64)
		if err != nil {
			return false
		}
		size = int(n)
		s.lax = s.lax || len(lengths) > 1
	}
	codings := r.header["transfer-encoding"]
	if len(codings) > 0 {
		r.last = true
	}
	if len(codings) == 0 || old {
		if size > len(s.rest) {
			return false
		}
		r.body, s.rest = s.rest[:size], s.rest[size:]
		// The proxy does not read on behind a body that it does not read.
		r.last = r.last || size > 0 && !r.forwarded()
		return true
	}
	if len(codings) > 1 || !strings.EqualFold(codings[0], "chunked") {
		return false // others may be valid: the proxy knows none
	}
	_, named := r.header["trailer"]
	s.lax = s.lax || named
	r.body, ok = s.chunks()
	return ok
}

// chunks reads a chunked body (RFC 9112, 7.1).
func (s *sentReader) chunks() (body string, ok bool) {
	for {
		line, rest, ok := strings.Cut(s.rest, "\r\n")
		m := chunkLine.FindStringSubmatch(line)
		if !ok || m == nil {
			return body, false
		}
		s.lax = s.lax || m[2] != ""
		size, err := strconv.ParseUint(m[1], 16, 64)
		s.rest = rest
		switch {
		case err != nil:
			return body, false
		case size == 0:
			return body, s.trailer()
		case size > uint64(len(rest)):
			return body, false
		}
		body += rest[:size]
		if s.rest, ok = strings.CutPrefix(rest[size:], "\r\n"); !ok {
			return body, false
		}
	}
}

// trailer reads what follows the last chunk. No server has a use for it, so its lines may be bad ones.
func (s *sentReader) trailer() (ok bool) {
	if rest, ok := strings.CutPrefix(s.rest, "\r\n"); ok {
		s.rest = rest
		return true
	}
	lines, rest, ok := strings.Cut(s.rest, "\r\n\r\n")
	_, valid := (&sentReader{rest: lines + "\r\n\r\n"}).fields()
	s.rest, s.lax = rest, s.lax || !valid
	return ok
}
