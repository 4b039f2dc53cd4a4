package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"time"
)

// fault is what goes wrong with a request.
type fault int

// The faults, by whose they are.
const (
	noFault fault = iota
	upstreamSlow
	upstreamSilent
	upstreamSilentOnce
	upstreamRefuses
	upstreamBreaksOff
	upstreamFallsSilent
	upstreamFails
	upstreamAnswersEarly
	clientLeavesUploading
	clientLeavesWaiting
	clientLeavesReading
	clientSendsSlowly
	clientFallsSilent
	clientSendsBadChunk
	clientSendsTooMuch
	clientSendsBothFramings
	clientSendsTwoLengths
)

const (
	// timeout is timeout_secs of the proxy, with one retry, and retryPause lies before that.
	timeout    = 2 * time.Second
	retryPause = 100 * time.Millisecond
	// slowest is how long an upstream that is only slow takes: less than timeout by
	// what a busy machine may add.
	slowest = time.Second
	// slowPieces are the pieces of a slow upload, and slowestPause is the longest between them.
	slowPieces   = 8
	slowestPause = 200 * time.Millisecond
	// faultShare is how many of a hundred requests go wrong.
	faultShare = 25
)

func (f fault) String() string { return faults[f].name }

// An ending is one way in which a request may end, as the proxy's log has it.
type ending struct {
	status   int    // 0: that of the upstream
	code     string // of the error; empty: there is none
	attempts int
	least    time.Duration // the request took no less
}

func (e ending) String() string {
	return fmt.Sprintf("status %d %s after %d attempts and %v at least", e.status, e.code, e.attempts, e.least)
}

// The codes of the errors in the log.
const (
	codeTimeout     = "timeout"
	codeConnection  = "connection"
	codeInvalid     = "invalid_request"
	codeRead        = "response_read"
	codeInternal    = "internal"
	codeClientGone  = "client_gone"
	codeSlowRequest = "request_timeout"
	codeSlowReader  = "client_gone, reading" // for a client that is there, and reads nothing
)

// statusClientGone is the status in log and metrics of a request whose client left.
const statusClientGone = 499

// again is how long an attempt without headers takes, and the pause behind it.
const again = timeout + retryPause

var (
	passed       = ending{attempts: 1}
	timedOut     = ending{http.StatusGatewayTimeout, codeTimeout, 2, again + timeout}
	broken       = ending{0, codeRead, 1, 0}
	refused      = ending{http.StatusBadGateway, codeConnection, 1, 0}
	invalid      = ending{http.StatusBadRequest, codeInvalid, 0, 0}
	sentTooSlow  = ending{http.StatusRequestTimeout, codeSlowRequest, 0, timeout}
	goneUnsent   = ending{statusClientGone, codeClientGone, 0, 0}
	goneAtFirst  = ending{statusClientGone, codeClientGone, 1, 0}
	goneAtSecond = ending{statusClientGone, codeClientGone, 2, again}
)

// lateEndings are those that requests may have besides if the machine stood still
// meanwhile: a client, an upstream or the answer to a ping comes too late then. They
// are counted apart, and few may be.
var lateEndings = []ending{
	sentTooSlow,
	{0, "", 2, again}, broken, {0, codeRead, 2, again},
	refused, {http.StatusBadGateway, codeConnection, 2, again}, timedOut,
	{statusClientGone, codeSlowReader, 1, timeout}, {statusClientGone, codeSlowReader, 2, 2 * timeout},
}

// faults are what each does to a plan that it fits, and how that may end. A seed stands
// for the requests that it does as long as the order of the rows stays.
var faults = [...]struct {
	name string
	fits func(p plan) bool
	harm func(p *plan, r *rand.Rand)
	ends []ending
}{
	noFault: {"none", nil, nil, []ending{passed}},

	upstreamSlow: {"the upstream is slow", always,
		func(p *plan, r *rand.Rand) { p.delay = upTo(r, slowest) }, []ending{passed}},
	upstreamSilent: {"the upstream is silent before headers, twice", always,
		func(p *plan, _ *rand.Rand) { p.silent = 2 }, []ending{timedOut}},
	upstreamSilentOnce: {"the upstream is silent before headers, once", always,
		func(p *plan, _ *rand.Rand) { p.silent = 1 }, []ending{{0, "", 2, again}}},
	upstreamRefuses: {"the upstream resets before headers", always,
		func(p *plan, r *rand.Rand) { p.early = r.IntN(2) == 0 }, []ending{refused}},
	upstreamBreaksOff: {"the upstream breaks off in the answer", longAnswer,
		func(p *plan, r *rand.Rand) { p.cut = within(r, p.answer) }, []ending{broken}},
	upstreamFallsSilent: {"the upstream falls silent in the answer", longAnswer,
		func(p *plan, r *rand.Rand) { p.cut = within(r, p.answer) }, []ending{{0, codeRead, 1, timeout}}},
	upstreamFails: {"the upstream answers 429, 500 or 529", func(p plan) bool { return p.method != http.MethodHead },
		func(p *plan, r *rand.Rand) { p.status = []int{429, 500, 529}[r.IntN(3)] }, []ending{passed}},
	upstreamAnswersEarly: {"the upstream answers without reading", largeRequest,
		func(p *plan, _ *rand.Rand) { p.early = true }, []ending{passed}},

	clientLeavesUploading: {"the client leaves in its upload", longRequest,
		func(p *plan, r *rand.Rand) { p.sends = within(r, p.request) }, []ending{goneUnsent}},
	clientLeavesWaiting: {"the client leaves while it waits", always, // in line, in an attempt, or just too late
		func(p *plan, r *rand.Rand) { p.silent, p.pause = 2, upTo(r, again+timeout+2*retryPause) },
		[]ending{goneUnsent, goneAtFirst, goneAtSecond, timedOut}},
	clientLeavesReading: {"the client leaves in the answer", longAnswer, func(p *plan, r *rand.Rand) {
		if p.answer.form != eventForm && r.IntN(2) == 0 {
			p.answer.size = 10 * mib // more than the sockets hold, so that it is missed
		}
		p.cut = within(r, p.answer)
	}, []ending{passed, goneAtFirst}}, // passed if the rest is in the sockets' buffers already
	clientSendsSlowly: {"the client uploads slowly", func(p plan) bool { return longRequest(p) && !largeRequest(p) },
		func(p *plan, r *rand.Rand) { p.pause = upTo(r, slowestPause) }, []ending{passed}},
	clientFallsSilent: {"the client falls silent in its upload", longRequest,
		func(p *plan, r *rand.Rand) { p.sends = within(r, p.request) }, []ending{sentTooSlow}},
	clientSendsBadChunk: {"the client sends a bad chunk", longRequest,
		func(p *plan, r *rand.Rand) { p.sends, p.chunked = within(r, p.request), true }, []ending{invalid}},
	clientSendsTooMuch: {"the client sends too large a body", largeRequest, func(p *plan, r *rand.Rand) {
		p.request.size = maxBody + 1 + r.Int64N(8<<10)
		if p.chunked { // else it is refused for the length that it declares
			p.sends = p.request.size
		} else {
			p.sends = 0
		}
	}, []ending{invalid}},
	clientSendsBothFramings: {"the client sends a length and chunks", longRequest,
		func(p *plan, _ *rand.Rand) { p.chunked = true }, []ending{passed}},
	clientSendsTwoLengths: {"the client sends two lengths", func(p plan) bool { return longRequest(p) && !p.chunked },
		func(p *plan, _ *rand.Rand) { p.sends = 0 }, nil}, // net/http refuses it: there is no log line
}

func always(plan) bool         { return true }
func longAnswer(p plan) bool   { return p.method != http.MethodHead && p.answer.size > 1 }
func longRequest(p plan) bool  { return p.request.size > 1 }
func largeRequest(p plan) bool { return p.request.size >= mib }

func upTo(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }

// within is a place in c that is neither its beginning nor its end.
func within(r *rand.Rand, c content) int64 { return 1 + r.Int64N(c.size-1) }

// reaches reports whether the request gets to the proxy's handler, and so into log and metrics.
func (p plan) reaches() bool { return p.kind != ownEndpoint && len(faults[p.fault].ends) > 0 }

// may reports whether p may end as the line says, if only on a machine that stood still.
func (p plan) may(line logLine, late bool) bool {
	ends := faults[p.fault].ends
	if late {
		sent := slices.ContainsFunc(ends, func(e ending) bool { return e.attempts > 0 })
		ends = lateEndings
		if !sent { // what never gets to the upstream can be late only on its way to the proxy
			ends = []ending{sentTooSlow}
		}
	}
	return slices.ContainsFunc(ends, func(e ending) bool {
		if e.code == "" {
			e.least += p.delay
		}
		return line.status == cmp.Or(e.status, p.status) && line.code == e.code && line.attempts == e.attempts &&
			line.latency >= e.least.Truncate(time.Millisecond)
	})
}
