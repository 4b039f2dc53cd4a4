package soak

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A plan is all that is to happen to one request. Client and upstream make it from the run's seed and the request's number, which
// stands in the path.
type plan struct {
	number      int
	kind, fault string // their names
	method      string
	path        string
	ends        []ending // one of which the log has
	reset       bool     // connections end with a TCP reset, else with FIN

	// What the client does.
	request  content
	chunked  bool   // the request
	length   int64  // which the request declares; 0: none
	tail     string // is sent behind the request's body
	pause    time.Duration
	patience time.Duration // it leaves, unless an answer begins before
	reads    int64         // bytes of the answer, and then it leaves; 0: it stays

	// What the upstream does.
	early    bool // it does not read the request
	refuses  bool // it breaks off before headers
	silent   int  // attempts to which it says nothing
	delay    time.Duration
	status   int
	answer   content
	declared bool          // the answer's length; else it has chunks, and a trailer
	pace     time.Duration // between two events of the answer
	stalls   bool          // an answer that is not whole falls silent, and does not break off
}

const (
	mib = 1 << 20
	// maxBody is max_body_mb of the proxy, timeout is timeout_secs. It tries once more, after retryPause.
	maxBody    = 10 * mib
	timeout    = 2 * time.Second
	retryPause = 100 * time.Millisecond
	again      = timeout + retryPause // takes an attempt without headers, with the pause behind it
	// slowest is how long an upstream that is only slow takes: less than timeout by what a busy machine may add.
	slowest = time.Second
	// slowPieces are the pieces of a slow upload, and slowestPause is the longest between them.
	slowPieces   = 8
	slowestPause = 200 * time.Millisecond
	// patience is how long a client waits for anything that has to happen: longer than a queue of requests that all time out.
	patience = time.Minute
	// faultShare is how many of a hundred requests go wrong.
	faultShare = 25
	// pathPrefix is that of all requests that are to reach the upstream.
	pathPrefix = "/v1/soak/"
)

// newPlan returns the plan for the request with this number.
func newPlan(seed uint64, number int) plan {
	r := dice{rand.New(rand.NewPCG(seed, uint64(number)))}
	small := func() content { return content{seed: r.Uint64(), size: 1 + r.Int64N(16<<10)} }
	p := plan{
		number: number, method: http.MethodPost, path: pathPrefix + strconv.Itoa(number), request: small(), patience: patience,
		status: http.StatusOK, answer: small(), declared: r.IntN(2) == 0, fault: noFault, ends: []ending{passed},
	}
	pick, kind := r.IntN(100), 0
	for ; pick >= kinds[kind].share; kind++ {
		pick -= kinds[kind].share
	}
	p.kind = kinds[kind].name
	kinds[kind].shape(&p, r)
	p.answer.sent = p.answer.size
	p.frame(r.IntN(4) == 0)
	if r.IntN(100) >= faultShare {
		return p
	}
	possible := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return !f.fits(p) })
	f := possible[r.IntN(len(possible))]
	p.fault, p.ends, p.reset = f.name, f.ends, r.IntN(2) == 0
	f.harm(&p, r)
	return p
}

// frame has the request sent whole, in chunks or with its length.
func (p *plan) frame(chunked bool) {
	p.request.sent = p.request.size
	p.chunked, p.length = chunked && p.request.size > 0, p.request.size
	if p.chunked {
		p.length, p.tail = 0, "0\r\n\r\n"
	}
}

// breakOff has the client send a part of the request, and then tail.
func (p *plan) breakOff(r dice, tail string) { p.request.sent, p.tail = r.within(p.request), tail }

// String names the request in what is wrong with it.
func (p plan) String() string {
	return fmt.Sprintf("request %d (%s, chunked: %v, fault: %s)", p.number, p.kind, p.chunked, p.fault)
}

// numberOf is the number in a path.
func numberOf(path string) (int, error) { return strconv.Atoi(strings.TrimPrefix(path, pathPrefix)) }

// A shaper makes a small POST what it is to be, or has something go wrong with it.
type shaper func(p *plan, r dice)

// kinds are the kinds of traffic, with how many of a hundred requests are of each.
var kinds = []struct {
	name  string
	share int
	shape shaper
}{
	{"small POST", 45, func(*plan, dice) {}},
	{"event stream", 20, func(p *plan, r dice) {
		p.answer.form, p.answer.size, p.declared = eventForm, int64(eventSize)*(5+r.Int64N(60)), false
		p.pace = time.Duration(r.IntN(30)) * time.Millisecond
	}},
	{"GET", 12, func(p *plan, _ dice) { p.method, p.request.size, p.answer.size = http.MethodGet, 0, 4*p.answer.size }},
	{"HEAD", 4, func(p *plan, _ dice) { p.method, p.request.size, p.declared = http.MethodHead, 0, true }},
	{"body that claims to be gzip", 8, func(p *plan, _ dice) { p.request.form, p.answer.form = gzipForm, gzipForm }},
	{"upload of 1 MiB", 5, func(p *plan, _ dice) { p.request.size = mib }},
	{"upload of 10 MiB", 3, func(p *plan, _ dice) { p.request.size = maxBody }},
	{"answer of 10 MiB", 3, func(p *plan, _ dice) { p.answer.size = 10 * mib }},
}

// An ending is one way in which a request may end, as the proxy's log has it.
type ending struct {
	status   int    // 0: that of the upstream
	code     string // of the error; empty: there is none
	attempts int
	least    time.Duration // the request took no less
}

// The codes of the errors in the log that mean something here, and one that stands for a client that is there, and reads nothing.
const (
	codeTimeout    = "timeout"
	codeConnection = "connection"
	codeRead       = "response_read"
	codeClientGone = "client_gone"
	codeSlowReader = "client_gone, reading"
)

var (
	passed      = ending{0, "", 1, 0}
	passedAgain = ending{0, "", 2, again}
	timedOut    = ending{504, codeTimeout, 2, again + timeout}
	broken      = ending{0, codeRead, 1, 0}
	fellSilent  = ending{0, codeRead, 1, timeout}
	refused     = ending{502, codeConnection, 1, 0}
	invalid     = ending{400, "invalid_request", 0, 0}
	sentTooSlow = ending{408, "request_timeout", 0, timeout}
	goneUnsent  = ending{499, codeClientGone, 0, 0}
	gone        = ending{499, codeClientGone, 1, 0}
	goneAgain   = ending{499, codeClientGone, 2, again}
)

// lateEndings are those that requests may have besides if the machine stood still meanwhile: a client, an upstream or the answer to
// a ping comes too late then. They are counted apart, and few may be.
var lateEndings = []ending{
	sentTooSlow, passedAgain, timedOut, broken, {0, codeRead, 2, again}, refused, {502, codeConnection, 2, again},
	{499, codeSlowReader, 1, timeout}, {499, codeSlowReader, 2, 2 * timeout},
}

// may reports whether p may end as the line says, if only on a machine that stood still.
func (p plan) may(line logLine, late bool) bool {
	ends := p.ends
	if late {
		ends = lateEndings
		if !slices.ContainsFunc(p.ends, func(e ending) bool { return e.attempts > 0 }) {
			ends = []ending{sentTooSlow} // it never gets to the upstream: only its way to the proxy can be late
		}
	}
	return slices.ContainsFunc(ends, func(e ending) bool {
		if e.code == "" {
			e.least += p.delay
		}
		return line.Status == cmp.Or(e.status, p.status) && line.code == e.code && line.Attempts == e.attempts &&
			line.Latency >= e.least.Milliseconds()
	})
}

// A fault is what goes wrong with a request that it fits, and how that may end.
type fault struct {
	name string
	fits func(p plan) bool
	harm shaper
	ends []ending
}

const noFault = "none"

var faults = []fault{
	{"the upstream is slow", always, func(p *plan, r dice) { p.delay = r.upTo(slowest) }, []ending{passed}},
	{"the upstream is silent before headers, twice", always, func(p *plan, _ dice) { p.silent = 2 }, []ending{timedOut}},
	{"the upstream is silent before headers, once", always, func(p *plan, _ dice) { p.silent = 1 }, []ending{passedAgain}},
	{"the upstream resets before headers", always, func(p *plan, r dice) { p.refuses, p.early = true, r.IntN(2) == 0 }, []ending{refused}},
	{"the upstream breaks off in the answer", longAnswer, func(p *plan, r dice) { p.answer.sent = r.within(p.answer) }, []ending{broken}},
	{"the upstream falls silent in the answer", longAnswer,
		func(p *plan, r dice) { p.answer.sent, p.stalls = r.within(p.answer), true }, []ending{fellSilent}},
	{"the upstream answers 429, 500 or 529", func(p plan) bool { return p.method != http.MethodHead },
		func(p *plan, r dice) { p.status = []int{429, 500, 529}[r.IntN(3)] }, []ending{passed}},
	{"the upstream answers without reading", largeRequest, func(p *plan, _ dice) { p.early = true }, []ending{passed}},

	{"the client leaves in its upload", longRequest,
		func(p *plan, r dice) { p.breakOff(r, ""); p.patience = r.upTo(timeout / 2) }, []ending{goneUnsent}},
	// It leaves in line, in the first or second attempt, or too late.
	{"the client leaves while it waits", always, func(p *plan, r dice) { p.silent, p.patience = 2, r.upTo(again+timeout+2*retryPause) },
		[]ending{goneUnsent, gone, goneAgain, timedOut}},
	// The sockets' buffers may hold what is left of the answer, and it has passed; half are larger than these.
	{"the client leaves in the answer", longAnswer, func(p *plan, r dice) {
		if p.answer.form != eventForm && r.IntN(2) == 0 {
			p.answer.size, p.answer.sent = 10*mib, 10*mib
		}
		p.reads = r.within(p.answer)
	}, []ending{passed, gone}},
	{"the client uploads slowly", func(p plan) bool { return longRequest(p) && !largeRequest(p) },
		func(p *plan, r dice) { p.pause = r.upTo(slowestPause) }, []ending{passed}},
	{"the client falls silent in its upload", longRequest, func(p *plan, r dice) { p.breakOff(r, "") }, []ending{sentTooSlow}},
	{"the client sends a bad chunk", longRequest,
		func(p *plan, r dice) { p.frame(true); p.breakOff(r, "not a size\r\n") }, []ending{invalid}},
	{"the client sends too large a body", largeRequest, func(p *plan, r dice) {
		p.request.size = maxBody + 1 + r.Int64N(8<<10)
		p.frame(p.chunked)
		if !p.chunked {
			p.request.sent = 0 // it is refused for the length that it declares
		}
	}, []ending{invalid}},
	{"the client sends a length and chunks", longRequest,
		func(p *plan, _ dice) { p.frame(true); p.length = p.request.size }, []ending{passed}},
}

func always(plan) bool         { return true }
func longAnswer(p plan) bool   { return p.method != http.MethodHead && p.answer.size > 1 }
func longRequest(p plan) bool  { return p.request.size > 1 }
func largeRequest(p plan) bool { return p.request.size >= mib }

// dice decide what the plans leave open.
type dice struct{ *rand.Rand }

func (r dice) upTo(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }

// within is a place in c that is neither its beginning nor its end.
func (r dice) within(c content) int64 { return 1 + r.Int64N(c.size-1) }
