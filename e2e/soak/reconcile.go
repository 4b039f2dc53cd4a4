package main

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// A logLine is a "request completed" of the proxy's log.
type logLine struct {
	number     int
	proxyID    string
	method     string
	status     int
	code       string // of the error
	attempts   int
	upstreamID string
	latency    time.Duration // in whole milliseconds
	bytesIn    int64
	bytesOut   int64
}

func (l logLine) String() string {
	return fmt.Sprintf("%s, status %d %s after %d attempts and %v, upstream id %q, %d bytes in, %d out",
		l.proxyID, l.status, l.code, l.attempts, l.latency, l.upstreamID, l.bytesIn, l.bytesOut)
}

// parseLine reads l; ok is false if it is no line of a completed request.
func parseLine(l proxytest.Line) (line logLine, ok bool, err error) {
	if l.Message() != proxytest.MsgRequestCompleted {
		return logLine{}, false, nil
	}
	number, err := numberOf(l.Text("path"))
	code, why, _ := strings.Cut(l.Text("error"), ": ")
	if code == codeClientGone && why == "the client stopped reading the answer" {
		code = codeSlowReader
	}
	return logLine{
		number:     number,
		proxyID:    l.Text("request_id"),
		method:     l.Text("method"),
		status:     int(l.Number("status")),
		code:       code,
		attempts:   int(l.Number("attempts")),
		upstreamID: l.Text("upstream_request_id"),
		latency:    time.Duration(l.Number("latency_ms")) * time.Millisecond,
		bytesIn:    int64(l.Number("bytes_in")),
		bytesOut:   int64(l.Number("bytes_out")),
	}, true, err
}

// judge says what is wrong with how p's request ended: the client got r, the
// upstream saw it seen times, and the log has the line. stalled says that the machine
// stood still meanwhile, late that the request ended as only then.
func judge(p plan, r result, seen int, line logLine, stalled bool) (wrong []string, late bool) {
	if !allowed(p.endings(), line) {
		if late = stalled && allowed(p.lateEndings(), line); !late {
			wrong = append(wrong, fmt.Sprintf("it may end only as one of %v", p.endings()))
		}
	}
	if line.method != p.method || r.proxyID != "" && r.proxyID != line.proxyID {
		wrong = append(wrong, "the log has another method or id than the client")
	}
	if line.attempts > 0 && line.bytesIn != p.request.size {
		wrong = append(wrong, fmt.Sprintf("%d bytes came in, the client sent %d", line.bytesIn, p.request.size))
	}
	if cut := line.code == codeClientGone || line.code == codeTimeout || late; seen > line.attempts || seen < line.attempts && !cut {
		wrong = append(wrong, fmt.Sprintf("the upstream saw %d attempts, the log has %d", seen, line.attempts))
	}
	if difference := compare(p, r, seen, line); difference != "" {
		wrong = append(wrong, difference)
	}
	return wrong, late
}

// allowed reports whether the line is of one of the endings.
func allowed(endings []ending, line logLine) bool {
	return slices.ContainsFunc(endings, func(e ending) bool {
		return e.status == line.status && e.code == line.code && e.attempts == line.attempts &&
			line.latency >= e.least.Truncate(time.Millisecond)
	})
}

// compare returns what differs between the answer as the client and the log have it.
func compare(p plan, r result, seen int, line logLine) string {
	size := p.answer.size
	if p.method == http.MethodHead {
		size = 0
	}
	answered := line.upstreamID != ""
	switch {
	case answered && line.upstreamID != upstreamID(p.number, seen):
		return "the log has the upstream's id of another request or attempt"
	case r.bytes > line.bytesOut && answered:
		return "the client got more than the proxy sent"
	case line.code == "" && line.bytesOut != size:
		return fmt.Sprintf("the log calls an answer of %d bytes complete, it has %d", line.bytesOut, size)
	case line.code == codeClientGone && !r.left:
		return "the log has the client gone, and it was not"
	case r.left:
		return "" // what it did not wait for can't be compared
	case r.status != line.status:
		return "the client got another status than the log has"
	case !answered && (!r.whole || p.method != http.MethodHead && r.code != line.code):
		return "the client got another error than the log has"
	case answered && r.whole != (line.code == ""):
		return "an answer that broke off looks whole, or a whole one broken"
	case answered && r.whole && r.bytes != size:
		return "a whole answer has another size"
	}
	return ""
}

// How many of a thousand requests may be late before the run is worth nothing. The
// race detector makes the proxy so slow that uploads of 10 MiB come too late on a busy
// machine that never stood still.
const (
	lateShare     = 5
	lateShareRace = 30
)

// reconcile compares each request that was sent with its one log line.
func reconcile(
	o options, results []result, lines []logLine, seen func(number int) int, stalls *pulse, problems *problems,
) (late int) {
	byNumber := map[int][]logLine{}
	for _, line := range lines {
		byNumber[line.number] = append(byNumber[line.number], line)
	}
	for _, r := range results {
		p := newPlan(o.seed, r.number)
		own := byNumber[r.number]
		delete(byNumber, r.number)
		switch {
		case !p.reaches() && len(own) == 0 && seen(r.number) == 0:
		case !p.reaches() || len(own) != 1:
			problems.add("%v: it has %d log lines, and reached the upstream %d times; the client: %v", p, len(own), seen(r.number), r)
		default:
			wrong, isLate := judge(p, r, seen(r.number), own[0], o.race || stalls.stalled(r.begun, r.ended))
			if len(wrong) > 0 {
				problems.add("%v: %s; the client: %v; the log: %v", p, strings.Join(wrong, "; "), r, own[0])
			}
			if isLate {
				late++
			}
		}
	}
	for _, number := range slices.Sorted(maps.Keys(byNumber)) {
		problems.add("the log has request %d, which nobody sent", number)
	}
	share := lateShare
	if o.race {
		share = lateShareRace
	}
	if late*1000 > len(lines)*share {
		problems.add("%d of %d requests were late: the machine is too busy, or the proxy too slow", late, len(lines))
	}
	return late
}
