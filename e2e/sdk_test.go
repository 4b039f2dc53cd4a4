package e2e

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/anthropics/anthropic-sdk-go/option"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// sdk is Anthropic's client as its users have it, with the base URL changed.
func sdk(p *proxytest.Proxy, options ...option.RequestOption) anthropic.Client {
	return anthropic.NewClient(append([]option.RequestOption{
		option.WithoutEnvironmentDefaults(), // keys of the machine's user are none of this test's business
		option.WithBaseURL(p.URL()),
		option.WithAuthToken("test-token"),
	}, options...)...)
}

var prompt = anthropic.MessageNewParams{
	Model:     "claude-fake-1",
	MaxTokens: 64,
	Messages:  []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("hi"))},
}

func TestSDK(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.API{Deltas: 60})
		p := proxyTo(t, up, "")
		c := sdk(p)

		message, err := c.Messages.New(t.Context(), prompt)
		if err != nil {
			t.Fatal(err)
		}
		text := message.Content[0].Text
		if message.StopReason != "end_turn" || len(strings.Fields(text)) != 60 {
			t.Errorf("message %s", message.RawJSON())
		}

		var streamed anthropic.Message
		stream := c.Messages.NewStreaming(t.Context(), prompt)
		for stream.Next() {
			if err := streamed.Accumulate(stream.Current()); err != nil {
				t.Fatal(err)
			}
		}
		if err := stream.Err(); err != nil {
			t.Fatal(err)
		}
		if len(streamed.Content) != 1 || streamed.Content[0].Text != text || streamed.StopReason != "end_turn" {
			t.Errorf("the stream says %s, the plain message %q", streamed.RawJSON(), text)
		}

		count, err := c.Messages.CountTokens(t.Context(), anthropic.MessageCountTokensParams{Model: prompt.Model, Messages: prompt.Messages})
		if err != nil || count.InputTokens != 10 {
			t.Errorf("counted tokens: %v, %v", count, err)
		}
		models, err := c.Models.List(t.Context(), anthropic.ModelListParams{})
		if err != nil || len(models.Data) != 1 {
			t.Errorf("models: %v, %v", models, err)
		}
		for _, r := range up.Requests() {
			if r.Header.Get("Authorization") != "Bearer test-token" || !strings.HasPrefix(r.Header.Get("User-Agent"), "Anthropic/Go") {
				t.Errorf("%s: headers %v are not the SDK's", r.RequestURI, r.Header)
			}
		}
	})
}

// checkSDKError checks that err is the SDK's API error with this status and our
// message and request id, which must be the id that the log has.
func checkSDKError(t *testing.T, p *proxytest.Proxy, err error, status int) {
	t.Helper()
	var e *anthropic.Error
	if !errors.As(err, &e) {
		t.Fatalf("%v (%T) is no API error of the SDK", err, err)
	}
	if e.StatusCode != status {
		t.Errorf("status %d, want %d", e.StatusCode, status)
	}
	if e.Type() != "proxy_error" || !strings.Contains(e.Error(), `"message":`) {
		t.Errorf("error %v: want our type and message", e)
	}
	line := completed(t, p, 1)[0]
	if e.RequestID == "" || line.Text("request_id") != e.RequestID {
		t.Errorf("request id %q, the log has %s", e.RequestID, line.Raw)
	}
	t.Log(e)
}

func TestSDKTooLarge(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, nil)
	p := proxyTo(t, up, "[proxy]\nmax_body_mb = 1\nbody_memory_mb = 1")
	large := prompt
	large.Messages = []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock(strings.Repeat("x", 1<<20)))}
	c := sdk(p)
	_, err := c.Messages.New(t.Context(), large)
	checkSDKError(t, p, err, 400)
}

func TestSDKBadGateway(t *testing.T) {
	t.Parallel()
	p := proxytest.Local(t, "http://"+closedPort(t), "")
	c := sdk(p, option.WithMaxRetries(0))
	_, err := c.Messages.New(t.Context(), prompt)
	checkSDKError(t, p, err, 502)
}

// TestSDKTimeout shows that a 504 stays one request with one round of attempts:
// the SDK, which would repeat it twice, heeds x-should-retry.
func TestSDKTimeout(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Silent())
	p := proxyTo(t, up, "[proxy]\ntimeout_secs = 1\nhonor_client_timeout = false")
	c := sdk(p)
	_, err := c.Messages.New(t.Context(), prompt)
	checkSDKError(t, p, err, 504)
	if n := len(up.Requests()); n != 3 {
		t.Errorf("%d attempts, want 3", n)
	}
}

// TestSDKPatience shows that a plain message that takes longer than timeout_secs
// arrives, sent once: the SDK says that it waits for ten minutes.
func TestSDKPatience(t *testing.T) {
	t.Parallel()
	up := upstream(t, fakeanthropic.HTTP2, fakeanthropic.Slow(2500*time.Millisecond, fakeanthropic.API{}))
	p := proxyTo(t, up, "proxy.timeout_secs = 1")
	c := sdk(p)
	if _, err := c.Messages.New(t.Context(), prompt); err != nil {
		t.Error(err)
	}
	if got := only(t, up).Header.Get("X-Stainless-Timeout"); got != "600" {
		t.Errorf("the SDK sent x-stainless-timeout %q", got)
	}
}

// TestSDKSilentStream shows that the SDK reports a stream that fell silent as an
// error, never as a complete answer.
func TestSDKSilentStream(t *testing.T) {
	t.Parallel()
	eachProtocol(t, func(t *testing.T, protocol fakeanthropic.Protocol) {
		up := upstream(t, protocol, fakeanthropic.API{StallAt: 3})
		p := proxyTo(t, up, "[proxy]\ntimeout_secs = 1\nhonor_client_timeout = false") // it would be patient for 600 s
		c := sdk(p)
		stream := c.Messages.NewStreaming(t.Context(), prompt)
		events := 0
		for stream.Next() {
			events++
		}
		if stream.Err() == nil {
			t.Errorf("after %d events the SDK takes the stream for complete", events)
		}
		if events < 5 {
			t.Errorf("%d events, want at least those of the three deltas", events)
		}
		t.Logf("after %d events: %v", events, stream.Err())
	})
}
