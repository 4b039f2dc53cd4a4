package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
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
	number int
	kind   string
	method string
	path   string
	shows  string // by an endpoint of the proxy's own; else empty

	request content
	sends   int64 // bytes of the request that the client sends
	chunked bool  // the request; else it declares its length

	status   int
	answer   content
	declared bool          // the answer's length; else it has chunks, and its checksum in a trailer
	pace     time.Duration // between two events of the answer

	fault  fault
	ends   []ending      // one of which the log has; none for what net/http refuses and for the proxy's own endpoints
	reset  bool          // connections end with a TCP reset, else with FIN
	early  bool          // the upstream does not read the request
	silent int           // attempts to which the upstream says nothing
	delay  time.Duration // before the upstream's headers
	cut    int64         // bytes of the answer until it breaks off, or the client leaves
	pause  time.Duration // between two pieces of the request, or until the client leaves
}

const (
	mib = 1 << 20
	// maxBody is max_body_mb of the proxy, timeout is timeout_secs. It tries once more, after retryPause.
	maxBody    = 10 * mib
	timeout    = 2 * time.Second
	retryPause = 100 * time.Millisecond
	// slowest is how long an upstream that is only slow takes: less than timeout by what a busy machine may add.
	slowest = time.Second
	// slowPieces are the pieces of a slow upload, and slowestPause is the longest between them.
	slowPieces   = 8
	slowestPause = 200 * time.Millisecond
	// faultShare is how many of a hundred requests go wrong.
	faultShare = 25
	// pathPrefix is that of all requests that are to reach the upstream.
	pathPrefix = "/v1/soak/"
)

// A shaper makes of a small POST what it is to be.
type shaper func(p *plan, r *rand.Rand)

// kinds are the kinds of traffic, with how many of a hundred requests are of each.
var kinds = []struct {
	name  string
	share int
	shape shaper
}{
	{"small POST", 40, func(*plan, *rand.Rand) {}},
	{"event stream", 20, func(p *plan, r *rand.Rand) {
		p.answer.form, p.answer.size, p.declared = eventForm, int64(eventSize)*(5+r.Int64N(60)), false
		p.pace = time.Duration(r.IntN(30)) * time.Millisecond
	}},
	{"GET", 10, func(p *plan, _ *rand.Rand) {
		p.method, p.request.size, p.answer.size = http.MethodGet, 0, 4*p.answer.size
	}},
	{"HEAD", 4, func(p *plan, _ *rand.Rand) { p.method, p.request.size, p.declared = http.MethodHead, 0, true }},
	{"body that claims to be gzip", 8, func(p *plan, _ *rand.Rand) { p.request.form, p.answer.form = gzipForm, gzipForm }},
	{"upload of 1 MiB", 5, func(p *plan, _ *rand.Rand) { p.request.size = mib }},
	{"upload of 10 MiB", 3, func(p *plan, _ *rand.Rand) { p.request.size = maxBody }},
	{"answer of 10 MiB", 3, func(p *plan, _ *rand.Rand) { p.answer.size = 10 * mib }},
	{"/health", 2, own(`"status":"healthy"`)},
	{"/livez", 2, own(`"status":"alive"`)},
	{"/metrics", 3, own("\nproxy_requests_in_flight ")},
}

// own is a request for an endpoint of the proxy's own.
func own(shows string) shaper {
	return func(p *plan, _ *rand.Rand) {
		p.method, p.path, p.shows, p.request.size, p.ends = http.MethodGet, p.kind, shows, 0, nil
	}
}

// newPlan returns the plan for the request with this number.
func newPlan(seed uint64, number int) plan {
	r := rand.New(rand.NewPCG(seed, uint64(number)))
	small := func() content { return content{seed: r.Uint64(), size: 1 + r.Int64N(16<<10)} }
	p := plan{
		number: number, method: http.MethodPost, path: pathPrefix + strconv.Itoa(number), request: small(), chunked: r.IntN(4) == 0,
		status: http.StatusOK, answer: small(), declared: r.IntN(2) == 0, fault: noFault, ends: []ending{passed},
	}
	pick := r.IntN(100)
	for _, k := range kinds {
		if pick -= k.share; pick < 0 {
			p.kind = k.name
			k.shape(&p, r)
			break
		}
	}
	p.chunked, p.sends = p.chunked && p.request.size > 0, p.request.size
	if p.shows != "" || r.IntN(100) >= faultShare {
		return p
	}
	possible := slices.DeleteFunc(slices.Clone(faults), func(f faultRow) bool { return !f.fits(p) })
	f := possible[r.IntN(len(possible))]
	p.fault, p.ends, p.reset = f.name, f.ends, r.IntN(2) == 0
	f.harm(&p, r)
	return p
}

// String names the request in what is wrong with it.
func (p plan) String() string {
	return fmt.Sprintf("request %d (%s, chunked: %v, fault: %s)", p.number, p.kind, p.chunked, p.fault)
}

// numberOf is the number in a path.
func numberOf(path string) (int, error) { return strconv.Atoi(strings.TrimPrefix(path, pathPrefix)) }

// fault is what goes wrong with a request.
type fault string

// The faults that client or upstream have to know; the others only change the plan.
const (
	noFault                 fault = "none"
	upstreamRefuses         fault = "the upstream resets before headers"
	upstreamBreaksOff       fault = "the upstream breaks off in the answer"
	upstreamFallsSilent     fault = "the upstream falls silent in the answer"
	clientLeavesUploading   fault = "the client leaves in its upload"
	clientLeavesWaiting     fault = "the client leaves while it waits"
	clientLeavesReading     fault = "the client leaves in the answer"
	clientSendsSlowly       fault = "the client uploads slowly"
	clientSendsBadChunk     fault = "the client sends a bad chunk"
	clientSendsBothFramings fault = "the client sends a length and chunks"
	clientSendsTwoLengths   fault = "the client sends two lengths"
)

// An ending is one way in which a request may end, as the proxy's log has it.
type ending struct {
	status   int    // 0: that of the upstream
	code     string // of the error; empty: there is none
	attempts int
	least    time.Duration // the request took no less
}

// The codes of the errors in the log, and what else it has of them.
const (
	codeTimeout     = "timeout"
	codeConnection  = "connection"
	codeInvalid     = "invalid_request"
	codeRead        = "response_read"
	codeInternal    = "internal"
	codeClientGone  = "client_gone"
	codeSlowRequest = "request_timeout"
	codeSlowReader  = "client_gone, reading" // for a client that is there, and reads nothing

	statusClientGone = 499
	again            = timeout + retryPause // takes an attempt without headers, with the pause behind it
)

var (
	passed      = ending{0, "", 1, 0}
	passedAgain = ending{0, "", 2, again}
	timedOut    = ending{http.StatusGatewayTimeout, codeTimeout, 2, again + timeout}
	broken      = ending{0, codeRead, 1, 0}
	refused     = ending{http.StatusBadGateway, codeConnection, 1, 0}
	invalid     = ending{http.StatusBadRequest, codeInvalid, 0, 0}
	sentTooSlow = ending{http.StatusRequestTimeout, codeSlowRequest, 0, timeout}
	goneUnsent  = ending{statusClientGone, codeClientGone, 0, 0}
	gone        = ending{statusClientGone, codeClientGone, 1, 0}
)

// lateEndings are those that requests may have besides if the machine stood still meanwhile: a client, an upstream or the answer to
// a ping comes too late then. They are counted apart, and few may be.
var lateEndings = []ending{
	sentTooSlow, passedAgain, timedOut, broken, {0, codeRead, 2, again}, refused, {http.StatusBadGateway, codeConnection, 2, again},
	{statusClientGone, codeSlowReader, 1, timeout}, {statusClientGone, codeSlowReader, 2, 2 * timeout},
}

// A faultRow is what a fault does to a plan that it fits, and how that may end.
type faultRow struct {
	name fault
	fits func(p plan) bool
	harm shaper
	ends []ending
}

var faults = []faultRow{
	{"the upstream is slow", always, func(p *plan, r *rand.Rand) { p.delay = upTo(r, slowest) }, []ending{passed}},
	{"the upstream is silent before headers, twice", always, func(p *plan, _ *rand.Rand) { p.silent = 2 }, []ending{timedOut}},
	{"the upstream is silent before headers, once", always, func(p *plan, _ *rand.Rand) { p.silent = 1 }, []ending{passedAgain}},
	{upstreamRefuses, always, func(p *plan, r *rand.Rand) { p.early = r.IntN(2) == 0 }, []ending{refused}},
	{upstreamBreaksOff, longAnswer, func(p *plan, r *rand.Rand) { p.cut = within(r, p.answer) }, []ending{broken}},
	{upstreamFallsSilent, longAnswer, func(p *plan, r *rand.Rand) { p.cut = within(r, p.answer) }, []ending{{0, codeRead, 1, timeout}}},
	{"the upstream answers 429, 500 or 529", func(p plan) bool { return p.method != http.MethodHead },
		func(p *plan, r *rand.Rand) { p.status = []int{429, 500, 529}[r.IntN(3)] }, []ending{passed}},
	{"the upstream answers without reading", largeRequest, func(p *plan, _ *rand.Rand) { p.early = true }, []ending{passed}},

	{clientLeavesUploading, longRequest, func(p *plan, r *rand.Rand) { p.sends = within(r, p.request) }, []ending{goneUnsent}},
	// It leaves in line, in the first or second attempt, or too late.
	{clientLeavesWaiting, always, func(p *plan, r *rand.Rand) { p.silent, p.pause = 2, upTo(r, again+timeout+2*retryPause) },
		[]ending{goneUnsent, gone, {statusClientGone, codeClientGone, 2, again}, timedOut}},
	// The sockets' buffers may hold what is left of the answer, and it has passed; half are larger than these.
	{clientLeavesReading, longAnswer, func(p *plan, r *rand.Rand) {
		if p.answer.form != eventForm && r.IntN(2) == 0 {
			p.answer.size = 10 * mib
		}
		p.cut = within(r, p.answer)
	}, []ending{passed, gone}},
	{clientSendsSlowly, func(p plan) bool { return longRequest(p) && !largeRequest(p) },
		func(p *plan, r *rand.Rand) { p.pause = upTo(r, slowestPause) }, []ending{passed}},
	{"the client falls silent in its upload", longRequest,
		func(p *plan, r *rand.Rand) { p.sends = within(r, p.request) }, []ending{sentTooSlow}},
	{clientSendsBadChunk, longRequest,
		func(p *plan, r *rand.Rand) { p.sends, p.chunked = within(r, p.request), true }, []ending{invalid}},
	{"the client sends too large a body", largeRequest, func(p *plan, r *rand.Rand) {
		p.request.size, p.sends = maxBody+1+r.Int64N(8<<10), 0 // it is refused for the length that it declares, if it does
		if p.chunked {
			p.sends = p.request.size
		}
	}, []ending{invalid}},
	{clientSendsBothFramings, longRequest, func(p *plan, _ *rand.Rand) { p.chunked = true }, []ending{passed}},
	{clientSendsTwoLengths, func(p plan) bool { return longRequest(p) && !p.chunked },
		func(p *plan, _ *rand.Rand) { p.sends = 0 }, nil},
}

func always(plan) bool         { return true }
func longAnswer(p plan) bool   { return p.method != http.MethodHead && p.answer.size > 1 }
func longRequest(p plan) bool  { return p.request.size > 1 }
func largeRequest(p plan) bool { return p.request.size >= mib }

func upTo(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }

// within is a place in c that is neither its beginning nor its end.
func within(r *rand.Rand, c content) int64 { return 1 + r.Int64N(c.size-1) }

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

// content is what a body consists of. Both ends make it from its seed, and so can check each byte, also of a body that broke off.
type content struct {
	form form
	seed uint64
	size int64
}

// form is what a content looks like.
type form int

const (
	binaryForm form = iota
	gzipForm        // begins as gzip does, and is none: a proxy that decodes it fails
	eventForm       // server-sent events, of eventSize bytes each
)

const (
	gzipHeader = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03"
	eventBegin = "event: content_block_delta\ndata: {\"type\":\"content_block_delta\",\"delta\":{\"text\":\""
	eventEnd   = "\"}}\n\n"
	eventText  = 96 // hexadecimal digits
	eventSize  = len(eventBegin) + eventText + len(eventEnd)
)

// bytes returns the content.
func (c content) bytes() []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.seed)
	all := make([]byte, c.size)
	rand.NewChaCha8(seed).Read(all) // never fails
	switch c.form {
	case gzipForm:
		copy(all, gzipHeader)
	case eventForm:
		for event := range slices.Chunk(all, eventSize) {
			copy(event, eventBegin+hex.EncodeToString(event[:eventText/2])+eventEnd)
		}
	}
	return all
}

// digest is a body's checksum, as headers and trailers have it.
func digest(body []byte) string {
	sum := sha256.Sum256(body)
	return hex.EncodeToString(sum[:])
}

// A checker compares what is written to it with the body that it wants.
type checker struct {
	want  []byte
	n     int64 // bytes so far
	wrong error // the first difference
}

// Write never fails, so that the connection is read to its end in any case.
func (c *checker) Write(p []byte) (int, error) {
	if c.wrong == nil && !bytes.HasPrefix(c.want[c.n:], p) {
		c.wrong = fmt.Errorf("a wrong byte, or one too many, between %d and %d of %d", c.n, c.n+int64(len(p)), len(c.want))
	}
	c.n += int64(len(p))
	return len(p), nil
}

// whole returns an error unless all of the body came, and sum is its checksum. What came of a body that broke off is in wrong.
func (c *checker) whole(sum string) error {
	switch {
	case c.wrong != nil:
		return c.wrong
	case c.n != int64(len(c.want)):
		return fmt.Errorf("%d bytes of %d, and yet a clean end", c.n, len(c.want))
	case sum != digest(c.want):
		return errors.New("the checksum was lost or changed")
	}
	return nil
}
