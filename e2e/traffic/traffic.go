// Package traffic is what ten users of Anthropic's SDK see of a proxy, with the repetitions that the SDK makes by itself.
package traffic

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anthropics/anthropic-sdk-go"
	"github.com/anthropics/anthropic-sdk-go/option"
)

// Each of the users sends a message every pause, or as soon as the last one is answered.
const (
	users = 10
	pause = 200 * time.Millisecond
)

// Traffic is under way until End.
type Traffic struct {
	users   [users]anthropic.Client
	begun   time.Time
	running sync.WaitGroup

	messages, failed, streams, cut atomic.Int64
	unanswered                     atomic.Int64 // requests, which the SDK repeats

	mu    sync.Mutex
	notes []string
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// New returns traffic to the proxy at base, by the way of c, whose Transport is an *http.Transport. There is none yet.
func New(c *http.Client, base string) *Traffic {
	l := &Traffic{begun: time.Now()}
	for i := range l.users {
		way := c.Transport.(*http.Transport).Clone()
		way.MaxIdleConnsPerHost = 1
		counting := &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			resp, err := way.RoundTrip(r)
			if err != nil {
				l.unanswered.Add(1)
			}
			return resp, err
		})}
		l.users[i] = anthropic.NewClient(option.WithoutEnvironmentDefaults(), option.WithBaseURL(base), option.WithAuthToken("test-token"),
			option.WithHTTPClient(counting), option.WithRequestTimeout(20*time.Second))
	}
	return l
}

var prompt = anthropic.MessageNewParams{Model: "claude-fake-1", MaxTokens: 64, Messages: []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("hi"))}}

// Send has all users send messages, 50 a second together, until ctx ends.
func (l *Traffic) Send(ctx context.Context) {
	for i := range l.users {
		l.running.Go(func() {
			for tick := time.NewTicker(pause); ; {
				select {
				case <-tick.C:
				case <-ctx.Done():
					tick.Stop()
					return
				}
				_, err := l.users[i].Messages.New(context.Background(), prompt)
				l.count(&l.messages, &l.failed, "message", err)
			}
		})
	}
}

// Stream begins n streams.
func (l *Traffic) Stream(n int) {
	for i := range n {
		l.running.Go(func() {
			stream := l.users[i%users].Messages.NewStreaming(context.Background(), prompt)
			ended := false
			for stream.Next() {
				ended = stream.Current().Type == "message_stop"
			}
			err := stream.Err()
			if err == nil && !ended {
				err = errors.New("it ended early")
			}
			l.count(&l.streams, &l.cut, "stream", err)
		})
	}
}

// count counts one of all, and one of bad if there was an error.
func (l *Traffic) count(all, bad *atomic.Int64, what string, err error) {
	all.Add(1)
	if err == nil {
		return
	}
	bad.Add(1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, fmt.Sprintf("%.1f s: %s: %v", time.Since(l.begun).Seconds(), what, err))
}

// Messages returns how many have ended.
func (l *Traffic) Messages() int64 { return l.messages.Load() }

// String tells what became of it all.
func (l *Traffic) String() string {
	return fmt.Sprintf("%d messages, %d failed; %d streams, %d cut; %d requests without an answer, which the SDK repeated", l.messages.Load(), l.failed.Load(),
		l.streams.Load(), l.cut.Load(), l.unanswered.Load())
}

// End waits for what is under way. Its error is what failed, if anything did.
func (l *Traffic) End() error {
	l.running.Wait()
	if len(l.notes) == 0 {
		return nil
	}
	return fmt.Errorf("%v:\n%s", l, strings.Join(l.notes[:min(10, len(l.notes))], "\n"))
}
