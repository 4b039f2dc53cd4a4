package e2e

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"math/rand"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestMethods shows that every method but CONNECT is forwarded, and which ones have a name in the metrics.
func TestMethods(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, answerOK, "")
		for i, row := range []struct{ method, label string }{
			{"GET", "GET"}, {"HEAD", "HEAD"}, {"POST", "POST"}, {"PUT", "PUT"}, {"PATCH", "PATCH"},
			{"DELETE", "DELETE"}, {"OPTIONS", "OPTIONS"}, {"TRACE", "TRACE"}, {"FROBNICATE", "other"}, {"get", "other"},
		} {
			a := s.Say(proxytest.Lines(row.method+" /v1/models HTTP/1.1", "Host: proxy", "", "")).AnswerTo(row.method)
			s.Passed(a, 200, map[bool]string{true: "", false: "ok"}[row.method == "HEAD"], 1)
			if got := up.Requests(); len(got) != i+1 || got[i].Method != row.method {
				s.Errorf("%s: %d requests at the upstream", row.method, len(got))
			}
			s.Completed()
			if !proxytest.Scrape(s.T, s.Proxy).Has("proxy_requests_total", "status", "200", "method", row.label) {
				s.Errorf("%s: not counted as method %q", row.method, row.label)
			}
		}
	})
}

// TestStatusesPass shows that the upstream's statuses are its own affair: they reach the client as they are, with the headers and the
// body that tell more, are not retried and not counted as errors.
func TestStatusesPass(t *testing.T) {
	tells := map[string]string{
		"Location": "/elsewhere", "Retry-After": "17", "Request-Id": "req_fake", "X-Should-Retry": "true", "Anthropic-Ratelimit-Requests-Remaining": "0",
	}
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			for name, value := range tells {
				w.Header().Set(name, value)
			}
			status, _ := strconv.Atoi(strings.TrimPrefix(r.URL.Path, "/"))
			w.WriteHeader(status)
			io.WriteString(w, "status "+r.URL.Path)
		}), "")
		for _, status := range []int{200, 201, 202, 301, 302, 307, 400, 401, 403, 404, 408, 409, 413, 422, 429, 499, 500, 502, 503, 504, 529, 599} {
			path := fmt.Sprint("/", status)
			a := s.Send("POST", path, strings.NewReader(proxytest.Message))
			s.Passed(a, status, "status "+path, 1)
			for name, value := range tells {
				if got := a.Header.Values(name); !slices.Equal(got, []string{value}) {
					s.Errorf("%d came with %s %q, want %q", status, name, got, value)
				}
			}
		}
	})
}

// TestGzipUntouched shows that compressed bodies pass as they are, whether or not the client asked for them.
func TestGzipUntouched(t *testing.T) {
	var compressed bytes.Buffer
	z := gzip.NewWriter(&compressed)
	io.WriteString(z, proxytest.Message)
	z.Close()
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			w.Write(compressed.Bytes())
		}), "")
		for i, headers := range [][]string{nil, {"Accept-Encoding", "gzip"}, {"Accept-Encoding", "br;q=1.0, gzip;q=0.8"}} {
			a := s.Post(headers...)
			s.Passed(a, 200, compressed.String(), 1)
			if got := a.Header.Get("Content-Encoding"); got != "gzip" {
				s.Errorf("%q: content-encoding %q", headers, got)
			}
			if got := up.Requests()[i].Header["Accept-Encoding"]; !slices.Equal(got, headers[min(1, len(headers)):]) {
				s.Errorf("the upstream got accept-encoding %q, want that of %q", got, headers)
			}
		}
	})
}

// TestHTTP10Client shows that an HTTP/1.0 client gets answers that end with the connection, also streams, and without chunks.
func TestHTTP10Client(t *testing.T) {
	t.Parallel()
	s := proxytest.NewScene(t)
	s.StartAPI(fakeanthropic.HTTP2, nil, "")
	for _, body := range []string{proxytest.Message, proxytest.Stream} {
		c := s.Say(proxytest.Lines("POST /v1/messages HTTP/1.0", "Authorization: Bearer x", fmt.Sprint("Content-Length: ", len(body)), "", body))
		all, err := io.ReadAll(c.R)
		if err != nil {
			t.Fatalf("the answer does not end with the connection: %v", err)
		}
		head, rest, _ := strings.Cut(string(all), "\r\n\r\n")
		if !strings.HasPrefix(head, "HTTP/1.0 200") && !strings.HasPrefix(head, "HTTP/1.1 200") {
			t.Errorf("answer %q", head)
		}
		if strings.Contains(strings.ToLower(head), "transfer-encoding") {
			t.Errorf("an HTTP/1.0 client got chunks: %q", head)
		}
		if !strings.HasPrefix(rest, "{") && !strings.HasSuffix(rest, "message_stop\"}\n\n") {
			t.Errorf("body %q is not whole", rest)
		}
		s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
	}
}

// TestBodiless: of an answer without a body the client gets what the upstream said, and nothing invented. All come over one
// connection: each shows that nothing is left of the one before.
func TestBodiless(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Etag", `"x"`)
			if r.Method == "HEAD" {
				w.Header().Set("Content-Length", "12345")
			}
			status, _ := strconv.Atoi(r.URL.Path[1:])
			w.WriteHeader(status)
		}), "")
		c := s.Dial()
		for _, row := range []struct {
			method string
			status int
			length []string
		}{{"HEAD", 200, []string{"12345"}}, {"HEAD", 200, []string{"12345"}}, {"GET", 204, nil}, {"GET", 304, nil}, {"GET", 204, nil}} {
			c.Say(proxytest.Lines(fmt.Sprintf("%s /%d HTTP/1.1", row.method, row.status), "Host: proxy", "", ""))
			a := c.AnswerTo(row.method)
			s.Passed(a, row.status, "", 1)
			for name, want := range map[string][]string{"Etag": {`"x"`}, "Content-Length": row.length, "Transfer-Encoding": nil, "Content-Type": nil} {
				if got := a.Header[name]; !slices.Equal(got, want) {
					s.Errorf("%s %d: %s %q, want %q", row.method, row.status, name, got, want)
				}
			}
		}
	})
}

// TestTrailers shows that an answer's trailers are forwarded, announced or not, and that a request's are dropped.
func TestTrailers(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Trailer", "X-Announced")
			fmt.Fprint(w, "trailers ", len(r.Trailer))
			fakeanthropic.Flush(w)
			w.Header().Set("X-Announced", "yes")
			w.Header().Set(http.TrailerPrefix+"X-Unannounced", "too")
		}), "")
		a := s.Say(proxytest.Lines("POST / HTTP/1.1", "Host: proxy", "Transfer-Encoding: chunked", "Trailer: X-Sum", "TE: trailers", "",
			"2\r\nhi\r\n0\r\nX-Sum: 42\r\n\r\n")).Answer()
		s.Passed(a, 200, "trailers 0", 1)
		if len(a.Trailer) != 2 || a.Trailer.Get("X-Announced") != "yes" || a.Trailer.Get("X-Unannounced") != "too" {
			s.Errorf("trailers %v, want both", a.Trailer)
		}
		if r := only(s, up); r.Header.Get("X-Sum") != "" || string(r.Body) != "hi" {
			s.Errorf("the upstream got headers %v, body %q", r.Header, r.Body)
		}
	})
}

// TestNothingInvented shows that the upstream gets the client's headers and the
// beta, and nothing that an HTTP library likes to add.
func TestNothingInvented(t *testing.T) {
	rows := []struct {
		lines []string
		want  []string // names of headers, besides anthropic-beta
	}{
		{[]string{"GET / HTTP/1.1", "Host: proxy", "", ""}, nil},
		{[]string{"GET / HTTP/1.0", "", ""}, nil},
		{[]string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 2", "", "hi"}, []string{"Content-Length"}},
		{[]string{"POST / HTTP/1.1", "Host: proxy", "Content-Length: 0", "", ""}, []string{"Content-Length"}},
		{[]string{
			"GET / HTTP/1.1", "Host: proxy", "User-Agent: curl/8", "Accept: */*", "Accept-Encoding: zstd",
			"Content-Type: x/y", "Authorization: Bearer abc", "X-Api-Key: key", "", "",
		}, []string{"Accept", "Accept-Encoding", "Authorization", "Content-Type", "User-Agent", "X-Api-Key"}},
	}
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, answerOK, "")
		for i, row := range rows {
			s.Passed(s.Say(proxytest.Lines(row.lines...)).Answer(), 200, "ok", 1)
			h := up.Requests()[i].Header
			want := slices.Sorted(slices.Values(append(row.want, "Anthropic-Beta")))
			if got := slices.Sorted(maps.Keys(h)); !slices.Equal(got, want) {
				s.Errorf("%q: the upstream got headers %v, want %v", row.lines, got, want)
			}
			if got := h["Anthropic-Beta"]; !slices.Equal(got, []string{fakeanthropic.OAuthBeta}) {
				s.Errorf("%q: the upstream got anthropic-beta %q", row.lines, got)
			}
			for _, line := range row.lines[1:] {
				if name, value, _ := strings.Cut(line, ": "); name != "Host" && value != "" && h.Get(name) != value {
					s.Errorf("%s arrived as %q, want %q", name, h.Get(name), value)
				}
			}
		}
	})
}

// TestResponseHeaders shows what is dropped of an answer's headers, and that nothing else is touched or added: not the order of many
// lines of one name either, which the request had too.
func TestResponseHeaders(t *testing.T) {
	hop := map[string]string{ // what HTTP/2 does not allow in the first place
		"Connection": "X-Named", "X-Named": "1", "Keep-Alive": "timeout=5", "Proxy-Connection": "keep-alive",
	}
	kept := map[string]string{
		"Retry-After": "17", "Request-Id": "req_upstream", "Anthropic-Ratelimit-Requests-Remaining": "0", "X-Odd": "ä,b",
		"Server": "fake", "Set-Cookie": "a=b; Path=/", "Cf-Ray": "abc", "Date": "Mon, 01 Jan 2001 00:00:00 GMT", "Content-Length": "2",
	}
	request, many := []string{"GET / HTTP/1.1", "Host: proxy"}, []string(nil)
	for i := range 200 {
		request, many = append(request, fmt.Sprint("X-Many: value ", i)), append(many, fmt.Sprint("value ", i))
	}
	request = append(request, "", "")
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			h := w.Header()
			h["X-Many"] = r.Header["X-Many"]
			all := maps.Clone(kept)
			if protocol == fakeanthropic.HTTP1 {
				maps.Copy(all, hop)
			}
			for name, value := range all {
				h.Set(name, value)
			}
			h.Set("Alt-Svc", `h3=":443"`)
			h.Set("X-Proxy-Request-Id", "req_forged")
			h["Content-Type"] = nil // sends none
			fmt.Fprint(w, "ok")
		}), "")
		a := s.Say(proxytest.Lines(request...)).Answer()
		s.Passed(a, 200, "ok", 1) // with an x-proxy-request-id of the proxy's own
		a.Header.Del("X-Proxy-Request-Id")
		if got := a.Header["X-Many"]; !slices.Equal(got, many) {
			s.Errorf("many lines came back as %q", got)
		}
		a.Header.Del("X-Many")
		for name, value := range kept {
			if got := a.Header.Values(name); !slices.Equal(got, []string{value}) {
				s.Errorf("%s came back as %q, want %q", name, got, value)
			}
			a.Header.Del(name)
		}
		if len(a.Header) > 0 {
			s.Errorf("headers that should not be there: %v", a.Header)
		}
		if line := s.Completed()[0]; line.Text("upstream_request_id") != "req_upstream" {
			s.Errorf("log line %s: want upstream_request_id req_upstream", line.Raw)
		}
	})
}

// TestLargestBody sends the largest body allowed there and back, bit for bit.
func TestLargestBody(t *testing.T) {
	const size = 10 << 20
	body := make([]byte, size)
	rand.New(rand.NewSource(1)).Read(body) // in which no stretch repeats
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		s.StartAPI(protocol, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			all, err := io.ReadAll(r.Body)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			w.Write(all)
		}), "")
		for name, reader := range map[string]io.Reader{
			"declared": bytes.NewReader(body),
			"chunked":  io.MultiReader(bytes.NewReader(body)), // hides the length
		} {
			a := s.Send("POST", "/v1/messages", reader)
			if a.StatusCode != 200 || a.Text != string(body) {
				s.Fatalf("%s: status %d and %d bytes, not those that were sent", name, a.StatusCode, len(a.Text))
			}
			s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
		}
		for _, line := range s.Completed() {
			if line.Number("bytes_in") != size || line.Number("bytes_out") != size {
				s.Errorf("log line %s: want bytes_in and bytes_out %d", line.Raw, size)
			}
		}
	})
}
