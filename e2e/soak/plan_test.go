package soak

import (
	"bytes"
	"cmp"
	"encoding/binary"
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
	*rand.Rand  // decides what kind and fault leave open
	number      int
	kind, fault string // their names
	method      string
	ends        []ending // one of which the log has
	reset       bool     // connections end with a TCP reset, else with FIN

	// What the client does.
	request  content
	chunked  bool          // the request
	length   int64         // that it declares; 0: none
	tail     string        // is sent behind the request's body
	pause    time.Duration // between two pieces of the request
	patience time.Duration // it leaves, unless an answer begins before
	reads    int64         // bytes of the answer, and then it leaves; 0: it stays

	// What the upstream does.
	early    bool // it does not read the request
	refuses  bool // it breaks off before headers
	silent   int  // attempts to which it says nothing
	delay    time.Duration
	status   int
	form     http.Header // the answer's, as far as its kind decides
	answer   content
	declared bool          // the answer's length; else it has chunks, and a trailer
	piece    int           // in which the answer comes
	pace     time.Duration // between two pieces
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
	eventSize  = 200
	pathPrefix = "/v1/soak/"
)

// newPlan returns the plan for the request with this number.
func newPlan(seed uint64, number int) plan {
	r := rand.New(rand.NewPCG(seed, uint64(number)))
	small := func() content { return content{seed: r.Uint64(), size: 1 + r.Int64N(16<<10)} }
	p := plan{
		Rand: r, number: number, method: http.MethodPost, request: small(), patience: patience, fault: noFault, ends: []ending{passed},
		status: 200, form: http.Header{"Content-Type": {"application/octet-stream"}}, answer: small(), piece: mib, declared: r.IntN(2) == 0,
	}
	pick, kind := r.IntN(100), 0
	for ; pick >= kinds[kind].share; kind++ {
		pick -= kinds[kind].share
	}
	p.kind = kinds[kind].name
	kinds[kind].shape(&p)
	p.answer.sent = p.answer.size
	p.frame(r.IntN(4) == 0)
	if r.IntN(100) < faultShare {
		possible := slices.DeleteFunc(slices.Clone(faults), func(f fault) bool { return !f.fits(p) })
		f := possible[r.IntN(len(possible))]
		p.fault, p.ends, p.reset = f.name, f.ends, r.IntN(2) == 0
		f.harm(&p)
	}
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
func (p *plan) breakOff(tail string) { p.request.sent, p.tail = p.within(p.request), tail }

// within is a place in c that is neither its beginning nor its end.
func (p *plan) within(c content) int64 { return 1 + p.Int64N(c.size-1) }

func (p *plan) upTo(d time.Duration) time.Duration { return time.Duration(p.Int64N(int64(d))) }

// numberOf is the number in a request's path, or 0, which is that of none.
func numberOf(path string) int {
	number, _ := strconv.Atoi(strings.TrimPrefix(path, pathPrefix))
	return number
}

// String names the request in what is wrong with it.
func (p plan) String() string {
	return fmt.Sprintf("request %d (%s, chunked: %v, fault: %s)", p.number, p.kind, p.chunked, p.fault)
}

// kinds are the kinds of traffic, with how many of a hundred requests are of each, and what makes it of a small POST.
var kinds = []struct {
	name  string
	share int
	shape func(p *plan)
}{
	{"small POST", 45, func(*plan) {}},
	{"event stream", 20, func(p *plan) {
		p.form.Set("Content-Type", "text/event-stream; charset=utf-8")
		p.answer.size, p.declared, p.piece, p.pace = eventSize*(5+p.Int64N(60)), false, eventSize, p.upTo(30*time.Millisecond)
	}},
	{"GET", 12, func(p *plan) { p.method, p.request.size, p.answer.size = http.MethodGet, 0, 4*p.answer.size }},
	{"HEAD", 4, func(p *plan) { p.method, p.request.size, p.declared = http.MethodHead, 0, true }},
	// It is none: a proxy that decodes it fails.
	{"body that claims to be gzip", 8, func(p *plan) { p.form.Set("Content-Encoding", "gzip") }},
	{"upload of 1 MiB", 5, func(p *plan) { p.request.size = mib }},
	{"upload of 10 MiB", 3, func(p *plan) { p.request.size = maxBody }},
	{"answer of 10 MiB", 3, func(p *plan) { p.answer.size = 10 * mib }},
}

// An ending is one way in which a request may end, as the proxy's log has it.
type ending struct {
	status   int    // 0: that of the upstream
	code     string // of the error; empty: there is none
	attempts int
	least    time.Duration // the request took no less
}

// slowReader stands for the code of a client that is there, and reads nothing.
const slowReader = "client_gone, reading"

var (
	passed      = ending{0, "", 1, 0}
	passedAgain = ending{0, "", 2, again}
	timedOut    = ending{504, "timeout", 2, again + timeout}
	broken      = ending{0, "response_read", 1, 0}
	refused     = ending{502, "connection", 1, 0}
	invalid     = ending{400, "invalid_request", 0, 0}
	sentTooSlow = ending{408, "request_timeout", 0, timeout}
	goneUnsent  = ending{499, "client_gone", 0, 0}
	gone        = ending{499, "client_gone", 1, 0}
	goneAgain   = ending{499, "client_gone", 2, again}
)

// lateEndings are those that requests may have besides if the machine stood still meanwhile: a client, an upstream or the answer to
// a ping comes too late then. They are counted apart, and few may be.
var lateEndings = []ending{
	sentTooSlow, passedAgain, timedOut, broken, {0, "response_read", 2, again}, refused, {502, "connection", 2, again},
	{499, slowReader, 1, timeout}, {499, slowReader, 2, 2 * timeout},
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
	harm func(p *plan)
	ends []ending
}

const noFault = "none"

var faults = []fault{
	{"the upstream is slow", always, func(p *plan) { p.delay = p.upTo(slowest) }, []ending{passed}},
	{"the upstream is silent before headers, twice", always, func(p *plan) { p.silent = 2 }, []ending{timedOut}},
	{"the upstream is silent before headers, once", always, func(p *plan) { p.silent = 1 }, []ending{passedAgain}},
	{"the upstream resets before headers", always, func(p *plan) { p.refuses, p.early = true, p.IntN(2) == 0 }, []ending{refused}},
	{"the upstream breaks off in the answer", longAnswer, func(p *plan) { p.answer.sent = p.within(p.answer) }, []ending{broken}},
	{"the upstream falls silent in the answer", longAnswer,
		func(p *plan) { p.answer.sent, p.stalls = p.within(p.answer), true }, []ending{{0, "response_read", 1, timeout}}},
	{"the upstream answers 429, 500 or 529", func(p plan) bool { return p.method != http.MethodHead },
		func(p *plan) { p.status = []int{429, 500, 529}[p.IntN(3)] }, []ending{passed}},
	{"the upstream answers without reading", largeRequest, func(p *plan) { p.early = true }, []ending{passed}},

	{"the client leaves in its upload", longRequest,
		func(p *plan) { p.breakOff(""); p.patience = p.upTo(timeout / 2) }, []ending{goneUnsent}},
	// It leaves in line, in the first or second attempt, or too late.
	{"the client leaves while it waits", always,
		func(p *plan) { p.silent, p.patience = 2, p.upTo(again+timeout+2*retryPause) }, []ending{goneUnsent, gone, goneAgain, timedOut}},
	// The sockets' buffers may hold what is left of the answer, and it has passed; half are larger than these.
	{"the client leaves in the answer", longAnswer, func(p *plan) {
		if p.piece > eventSize && p.IntN(2) == 0 {
			p.answer.size, p.answer.sent = 10*mib, 10*mib
		}
		p.reads = p.within(p.answer)
	}, []ending{passed, gone}},
	{"the client uploads slowly", func(p plan) bool { return longRequest(p) && !largeRequest(p) },
		func(p *plan) { p.pause = p.upTo(slowestPause) }, []ending{passed}},
	{"the client falls silent in its upload", longRequest, func(p *plan) { p.breakOff("") }, []ending{sentTooSlow}},
	{"the client sends a bad chunk", longRequest, func(p *plan) { p.frame(true); p.breakOff("not a size\r\n") }, []ending{invalid}},
	{"the client sends too large a body", largeRequest, func(p *plan) {
		p.request.size = maxBody + 1 + p.Int64N(8<<10)
		p.frame(p.chunked)
		if !p.chunked {
			p.request.sent = 0 // it is refused for the length that it declares
		}
	}, []ending{invalid}},
	{"the client sends a length and chunks", longRequest,
		func(p *plan) { p.frame(true); p.length = p.request.size }, []ending{passed}},
}

func always(plan) bool         { return true }
func longAnswer(p plan) bool   { return p.method != http.MethodHead && p.answer.size > 1 }
func longRequest(p plan) bool  { return p.request.size > 1 }
func largeRequest(p plan) bool { return p.request.size >= mib }

// content is what a body consists of. Both ends make it from its seed, and so can check each byte, also of a body that broke off.
type content struct {
	seed uint64
	size int64
	sent int64 // less than size if it breaks off
}

func (c content) bytes() []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.seed)
	all := make([]byte, c.size)
	rand.NewChaCha8(seed).Read(all) // never fails
	return all
}

// check returns how got differs from the content, of which it may be a part unless it is whole.
func (c content) check(got []byte, whole bool) error {
	switch {
	case !bytes.HasPrefix(c.bytes(), got):
		return fmt.Errorf("a wrong byte, or one too many, in %d of %d", len(got), c.size)
	case whole && int64(len(got)) != c.size:
		return fmt.Errorf("%d bytes of %d, and yet a clean end", len(got), c.size)
	}
	return nil
}
