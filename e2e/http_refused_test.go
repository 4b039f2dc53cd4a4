package e2e

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// reaction is what an HTTP/2 upstream does with a request it has the headers of.
type reaction func(f *http2.Framer, stream uint32)

func resetWith(code http2.ErrCode) reaction {
	return func(f *http2.Framer, stream uint32) { f.WriteRSTStream(stream, code) }
}

// goAway says that this request and all later ones were not processed.
func goAway(f *http2.Framer, stream uint32) { f.WriteGoAway(stream-1, http2.ErrCodeNo, nil) }

func answerEmpty(f *http2.Framer, stream uint32) {
	var block bytes.Buffer
	hpack.NewEncoder(&block).WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
}

// http2Upstream reacts to the first request with the first reaction, and so on,
// the last one being repeated. got counts the requests.
func http2Upstream(t *testing.T, reactions ...reaction) (up *fakeanthropic.Server, got *atomic.Int32) {
	t.Helper()
	got = new(atomic.Int32)
	up, err := fakeanthropic.StartRaw(func(conn net.Conn) {
		if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
			return
		}
		f := http2.NewFramer(conn, conn)
		f.WriteSettings()
		for {
			frame, err := f.ReadFrame()
			if err != nil {
				return
			}
			switch frame := frame.(type) {
			case *http2.SettingsFrame:
				if !frame.IsAck() {
					f.WriteSettingsAck()
				}
			case *http2.HeadersFrame:
				n := int(got.Add(1))
				reactions[min(n, len(reactions))-1](f, frame.StreamID)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { up.Close() })
	return up, got
}

// TestRefusedUnprocessed shows that what an HTTP/2 upstream says it has not
// processed is sent once more, and nothing else is.
func TestRefusedUnprocessed(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name      string
		reactions []reaction
		status    int
		sent      int32
	}{
		{name: "answered", reactions: []reaction{answerEmpty}, status: 200, sent: 1},
		{name: "refused once", reactions: []reaction{resetWith(http2.ErrCodeRefusedStream), answerEmpty}, status: 200, sent: 2},
		{name: "refused for ever", reactions: []reaction{resetWith(http2.ErrCodeRefusedStream)}, status: 502, sent: 2},
		{name: "gone away unprocessed", reactions: []reaction{goAway, answerEmpty}, status: 200, sent: 2},
		{name: "broken, perhaps processed", reactions: []reaction{resetWith(http2.ErrCodeInternal), answerEmpty}, status: 502, sent: 1},
		{name: "cancelled, perhaps processed", reactions: []reaction{resetWith(http2.ErrCodeCancel), answerEmpty}, status: 502, sent: 1},
	}
	for _, tt := range tests {
		for _, method := range []string{"POST", "GET"} {
			t.Run(tt.name+"/"+method, func(t *testing.T) {
				t.Parallel()
				up, got := http2Upstream(t, tt.reactions...)
				p := proxyTo(t, up, "[proxy]\ntimeout_secs = 5\ntimeout_retries = 0")
				var body io.Reader
				if method == "POST" {
					body = strings.NewReader(messageBody)
				}
				start := time.Now()
				res := <-inBackground(t, newRequest(t, method, p.URL()+"/v1/messages", body))
				t.Logf("sent %d times within %v", got.Load(), time.Since(start).Round(time.Millisecond))
				if res.err != nil {
					t.Fatal(res.err)
				}
				a := res.answer
				if a.StatusCode != tt.status {
					t.Errorf("status %d, want %d: %s", a.StatusCode, tt.status, a.body)
				}
				if n := got.Load(); n != tt.sent {
					t.Errorf("the upstream got the request %d times, want %d", n, tt.sent)
				}
				if tt.status == 502 {
					checkConnectionError(t, p, a)
				}
			})
		}
	}
}

// TestUpstreamComesUp shows that nothing of an outage is remembered: the first
// request after it is answered.
func TestUpstreamComesUp(t *testing.T) {
	t.Parallel()
	port := reservePort(t)
	p := proxytest.Local(t, "http://"+port.addr, "")
	for range 3 {
		checkProxyError(t, post(t, p, messageBody), 502, "connection")
	}
	server := &http.Server{Handler: answerOK}
	t.Cleanup(func() { server.Close() })
	listener := port.listen(t)
	go server.Serve(listener)
	if a := post(t, p, messageBody); a.StatusCode != 200 {
		t.Errorf("after the outage: status %d %s", a.StatusCode, a.body)
	}
}
