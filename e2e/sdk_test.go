package e2e

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/anthropics/anthropic-sdk-go/option"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// sdk is Anthropic's client as its users have it, with the base URL changed.
func sdk(s *proxytest.Scene, options ...option.RequestOption) anthropic.Client {
	return anthropic.NewClient(append([]option.RequestOption{
		option.WithoutEnvironmentDefaults(), // keys of the machine's user are none of this test's business
		option.WithBaseURL(s.Proxy.URL()),
		option.WithHTTPClient(s.Client),
		option.WithAuthToken("test-token"),
	}, options...)...)
}

var prompt = anthropic.MessageNewParams{
	Model:     "claude-fake-1",
	MaxTokens: 64,
	Messages:  []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("hi"))},
}

func TestSDK(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		up := s.StartAPI(protocol, fakeanthropic.API{Deltas: 60}, "")
		c := sdk(s)

		message := proxytest.Must(c.Messages.New(s.Context(), prompt))(s)
		text := message.Content[0].Text
		if message.StopReason != "end_turn" || len(strings.Fields(text)) != 60 {
			s.Errorf("message %s", message.RawJSON())
		}

		var streamed anthropic.Message
		stream := c.Messages.NewStreaming(s.Context(), prompt)
		for stream.Next() {
			proxytest.Check(s, streamed.Accumulate(stream.Current()))
		}
		proxytest.Check(s, stream.Err())
		if len(streamed.Content) != 1 || streamed.Content[0].Text != text || streamed.StopReason != "end_turn" {
			s.Errorf("the stream says %s, the plain message %q", streamed.RawJSON(), text)
		}

		count, err := c.Messages.CountTokens(s.Context(), anthropic.MessageCountTokensParams{Model: prompt.Model, Messages: prompt.Messages})
		if err != nil || count.InputTokens != 10 {
			s.Errorf("counted tokens: %v, %v", count, err)
		}
		models, err := c.Models.List(s.Context(), anthropic.ModelListParams{})
		if err != nil || len(models.Data) != 1 {
			s.Errorf("models: %v, %v", models, err)
		}
		for _, r := range up.Requests() {
			s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
			if r.Header.Get("Authorization") != "Bearer test-token" || !strings.HasPrefix(r.Header.Get("User-Agent"), "Anthropic/Go") {
				s.Errorf("%s: headers %v are not the SDK's", r.RequestURI, r.Header)
			}
		}
	})
}

// TestSDKErrors: the proxy's own errors are API errors to the SDK, with our type, message and request id, which is the log's. A 504
// stays one request with one round of attempts: the SDK, which would repeat it twice, heeds x-should-retry.
func TestSDKErrors(t *testing.T) {
	t.Parallel()
	large := prompt
	large.Messages = []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock(strings.Repeat("x", 1<<20)))}
	hangsUp := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	for _, row := range []struct {
		upstream http.Handler
		config   string
		prompt   anthropic.MessageNewParams
		options  []option.RequestOption
		want     proxytest.Completed
	}{
		{nil, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1", large, nil,
			proxytest.Completed{Status: 400, ErrorType: "invalid_request", Err: "larger than 1 MiB"}},
		{hangsUp, "", prompt, []option.RequestOption{option.WithMaxRetries(0)},
			proxytest.Completed{Status: 502, Attempts: 1, ErrorType: "connection", Err: "EOF"}},
		{fakeanthropic.Silent(), "[proxy]\ntimeout_secs = 1\nhonor_client_timeout = false", prompt, nil,
			proxytest.Completed{Status: 504, Attempts: 3, ErrorType: "timeout", Err: "timeout:"}},
	} {
		t.Run(row.want.ErrorType, func(t *testing.T) {
			t.Parallel()
			s := proxytest.NewScene(t)
			s.StartAPI(fakeanthropic.HTTP1, row.upstream, row.config)
			c := sdk(s, row.options...)
			_, err := c.Messages.New(t.Context(), row.prompt)
			s.Expect(row.want)
			var e *anthropic.Error
			if !errors.As(err, &e) {
				t.Fatalf("%v (%T) is no API error of the SDK", err, err)
			}
			if e.StatusCode != row.want.Status || e.Type() != "proxy_error" || !strings.Contains(e.Error(), `"message":`) {
				t.Errorf("error %v: want status %d, our type and message", e, row.want.Status)
			}
			if line := s.Completed()[0]; e.RequestID == "" || line.Text("request_id") != e.RequestID {
				t.Errorf("request id %q, the log has %s", e.RequestID, line.Raw)
			}
		})
	}
}

// TestSDKPatience shows that a plain message that takes longer than timeout_secs
// arrives, sent once: the SDK says that it waits for ten minutes.
func TestSDKPatience(t *testing.T) {
	t.Parallel()
	s := proxytest.NewScene(t)
	up := s.StartAPI(fakeanthropic.HTTP2, fakeanthropic.Slow(2500*time.Millisecond, fakeanthropic.API{}), "proxy.timeout_secs = 1")
	c := sdk(s)
	proxytest.Must(c.Messages.New(t.Context(), prompt))(t)
	s.Expect(proxytest.Completed{Status: 200, Attempts: 1})
	if got := only(t, up).Header.Get("X-Stainless-Timeout"); got != "600" {
		t.Errorf("the SDK sent x-stainless-timeout %q", got)
	}
}

// TestSDKSilentStream shows that the SDK reports a stream that fell silent as an error, never as a complete answer.
func TestSDKSilentStream(t *testing.T) {
	eachProtocol(t, func(s *proxytest.Scene, protocol fakeanthropic.Protocol) {
		s.StartAPI(protocol, fakeanthropic.API{StallAt: 3}, "[proxy]\ntimeout_secs = 5\nhonor_client_timeout = false") // it would be patient for 600 s
		c := sdk(s)
		stream := c.Messages.NewStreaming(s.Context(), prompt)
		events := 0
		for stream.Next() {
			events++
		}
		if stream.Err() == nil || events < 5 {
			s.Errorf("after %d events, at least five of them of the three deltas, the SDK says %v", events, stream.Err())
		}
		s.Expect(proxytest.Completed{Status: 200, Attempts: 1, ErrorType: "response_read", Err: "silent"})
	})
}
