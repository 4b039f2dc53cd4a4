package soak

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A logLine is a "request completed" of the proxy's log.
type logLine struct {
	RequestID  string `json:"request_id"`
	Method     string
	Path       string
	Status     int
	Error      string
	Attempts   int
	UpstreamID string `json:"upstream_request_id"`
	Latency    int64  `json:"latency_ms"` // whole milliseconds
	BytesIn    int64  `json:"bytes_in"`
	BytesOut   int64  `json:"bytes_out"`

	number int    // in the path
	code   string // that the error begins with
}

// completed returns the lines of requests, and what trouble the log tells of.
func completed(log []proxytest.Line) (lines []logLine, trouble []string) {
	for _, l := range log {
		var line logLine
		err := json.Unmarshal([]byte(l.Raw), &line)
		if err == nil && l.Message() == proxytest.MsgRequestCompleted {
			line.number = numberOf(line.Path)
			line.code, _, _ = strings.Cut(line.Error, ": ")
			if line.Error == "client_gone: the client stopped reading the answer" {
				line.code = slowReader
			}
			lines = append(lines, line)
		}
		if err != nil || l.Text("level") != "INFO" {
			trouble = append(trouble, fmt.Sprintf("the log has %.2000s (%v)", l.Raw, err))
		}
	}
	return lines, trouble
}

// judge says what is wrong with how p's request ended. stalled says that the machine stood still meanwhile, late that the request
// ended as only then.
func judge(p plan, x exchange, stalled bool) (wrong []string, late bool) {
	r := x.client
	if r.from.IsZero() || len(x.log) != 1 {
		return []string{fmt.Sprintf("it has %d log lines, or nobody sent it", len(x.log))}, false
	}
	line := x.log[0]
	planned := p.may(line, false)
	late = !planned && stalled && p.may(line, true)
	size := p.answer.size
	if p.method == http.MethodHead {
		size = 0
	}
	answered, complete, stayed := line.UpstreamID != "", line.code == "", !r.left
	unseen := late || line.code == gone.code || line.code == timedOut.code // is an attempt that was given up on its way, perhaps
	for _, check := range []struct {
		wrong bool
		what  string
	}{
		{!planned && !late, fmt.Sprintf("it may end only as one of %+v", p.ends)},
		{line.Method != p.method || r.proxyID != "" && r.proxyID != line.RequestID, "the log has another method or id than the client"},
		{line.Attempts > 0 && line.BytesIn != p.request.size, "the log has another number of bytes in than the client sent"},
		{x.attempts > line.Attempts || x.attempts < line.Attempts && !unseen, "the upstream saw another number of attempts"},
		{answered && line.UpstreamID != fmt.Sprint(upstreamID(p.number), x.attempts), "the answer is that to another request or attempt"},
		{answered && r.bytes > line.BytesOut, "the client got more than the proxy sent"},
		{complete && line.BytesOut != size, "the log calls an answer complete that is not"},
		{line.code == gone.code && stayed, "the log has the client gone, and it was not"},
		{stayed && r.status != line.Status, "the client got another status than the log has"},
		{stayed && !answered && (!r.whole || p.method != http.MethodHead && r.code != line.code), "the client got another error"},
		{stayed && answered && r.whole != complete, "an answer that broke off looks whole, or a whole one broken"},
		{stayed && answered && r.whole && r.bytes != size, "a whole answer has another size"},
	} {
		if check.wrong {
			wrong = append(wrong, check.what)
		}
	}
	return wrong, late
}

const (
	// beat is the time between two looks at the clock.
	beat = 50 * time.Millisecond
	// stallLength is how late a look has to be to count: timeouts here are of a second or two, and other processes stand still longer
	// than this one at times.
	stallLength = 200 * time.Millisecond
	// stallMargin widens a request's time: a connection that is lost went silent before, and the proxy may notice a client's departure
	// later.
	stallMargin = 3 * time.Second
)

// A span is from one time to another.
type span struct{ from, to time.Time }

// stalls returns the spans when this process got no processor, and so the others on this machine hardly did, until ctx ends.
func stalls(ctx context.Context) (all []span) {
	for ctx.Err() == nil {
		s := span{from: time.Now()}
		time.Sleep(beat)
		if s.to = time.Now(); s.to.Sub(s.from) >= beat+stallLength {
			all = append(all, s)
		}
	}
	return all
}

// near reports whether one of these was at about that time.
func (s span) near(stalls []span) bool {
	return slices.ContainsFunc(stalls, func(stall span) bool {
		return stall.from.Before(s.to.Add(stallMargin)) && stall.to.After(s.from.Add(-stallMargin))
	})
}
