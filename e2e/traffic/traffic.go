// Package traffic is what ten users of Anthropic's SDK see of a proxy, with the repetitions that the SDK makes by itself.
package traffic

import (
	"context"
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

	messages atomic.Int64 // that have ended

	mu     sync.Mutex
	failed []string
}

// New returns traffic to the proxy at base, by the way of c, whose Transport is an *http.Transport. There is none yet.
func New(c *http.Client, base string) *Traffic {
	l := &Traffic{begun: time.Now()}
	for i := range l.users {
		own := &http.Client{Transport: c.Transport.(*http.Transport).Clone()}
		l.users[i] = anthropic.NewClient(option.WithoutEnvironmentDefaults(), option.WithBaseURL(base), option.WithAuthToken("test-token"),
			option.WithHTTPClient(own), option.WithRequestTimeout(20*time.Second))
	}
	return l
}

var prompt = anthropic.MessageNewParams{
	Model: "claude-fake-1", MaxTokens: 64, Messages: []anthropic.MessageParam{anthropic.NewUserMessage(anthropic.NewTextBlock("hi"))},
}

// Send has all users send messages, 50 a second together, until ctx ends.
func (l *Traffic) Send(ctx context.Context) {
	for i := range l.users {
		l.running.Go(func() {
			for tick := time.Tick(pause); ctx.Err() == nil; <-tick {
				_, err := l.users[i].Messages.New(context.Background(), prompt)
				l.messages.Add(1)
				if err != nil {
					l.mu.Lock()
					l.failed = append(l.failed, fmt.Sprintf("%.1f s: %v", time.Since(l.begun).Seconds(), err))
					l.mu.Unlock()
				}
			}
		})
	}
}

// Messages returns how many have ended.
func (l *Traffic) Messages() int64 { return l.messages.Load() }

// String tells what became of it all.
func (l *Traffic) String() string {
	return fmt.Sprintf("%d messages", l.messages.Load())
}

// End waits for what is under way. Its error is what failed, if anything did.
func (l *Traffic) End() error {
	l.running.Wait()
	if len(l.failed) == 0 {
		return nil
	}
	return fmt.Errorf("%v; %d failed:\n%s", l, len(l.failed), strings.Join(l.failed[:min(10, len(l.failed))], "\n"))
}
