package main

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A plan is all that is to happen to one request. Client and upstream make it from
// the run's seed and the request's number, which stands in the path.
type plan struct {
	number int
	kind   kind
	fault  fault
	method string
	path   string

	request content
	chunked bool // the request; else it declares its length

	status   int
	answer   content
	declared bool // the answer's length; else it has chunks, and its checksum in a trailer

	pace time.Duration // between two events of the answer

	at    int64         // the byte of the request or answer at which the fault happens
	pause time.Duration // of the fault
	reset bool          // connections end with a TCP reset, else with FIN
	early bool          // the upstream does not read the request
}

// kind is what a request is for.
type kind int

// The kinds of traffic.
const (
	smallPost kind = iota
	eventStream
	get
	head
	gzipPost
	upload1
	upload10
	download10
	ownEndpoint
)

// kinds are the kinds' names and how many of a hundred requests are of them.
var kinds = [...]struct {
	name  string
	share int
}{
	smallPost:   {"small POST", 40},
	eventStream: {"event stream", 20},
	get:         {"GET", 10},
	head:        {"HEAD", 4},
	gzipPost:    {"body that claims to be gzip", 8},
	upload1:     {"upload of 1 MiB", 5},
	upload10:    {"upload of 10 MiB", 3},
	download10:  {"answer of 10 MiB", 3},
	ownEndpoint: {"/health, /livez, /metrics", 7},
}

func (k kind) String() string { return kinds[k].name }

const (
	mib = 1 << 20
	// maxBody is max_body_mb of the proxy.
	maxBody = 10 * mib
	// pathPrefix is that of all requests that are to reach the upstream.
	pathPrefix = "/v1/soak/"
)

// ownEndpoints are answered by the proxy itself.
var ownEndpoints = [...]string{"/health", "/livez", "/metrics"}

// newPlan returns the plan for the request with this number.
func newPlan(seed uint64, number int) plan {
	r := rand.New(rand.NewPCG(seed, uint64(number)))
	p := plan{
		number: number,
		kind:   pickKind(r),
		method: http.MethodPost,
		path:   pathPrefix + strconv.Itoa(number),
		status: http.StatusOK,
	}
	if p.kind == ownEndpoint {
		p.method, p.path = http.MethodGet, ownEndpoints[r.IntN(len(ownEndpoints))]
		return p
	}
	p.fill(r)
	if possible := p.possibleFaults(); r.IntN(100) < faultShare {
		p.harm(possible[r.IntN(len(possible))], r)
	}
	return p
}

// String names the request in what is wrong with it.
func (p plan) String() string {
	return fmt.Sprintf("request %d (%v, chunked: %v, fault: %v)", p.number, p.kind, p.chunked, p.fault)
}

// numberOf is the number in a path.
func numberOf(path string) (int, error) {
	digits, ok := strings.CutPrefix(path, pathPrefix)
	if !ok {
		return 0, fmt.Errorf("unexpected path %q", path)
	}
	return strconv.Atoi(digits)
}

func pickKind(r *rand.Rand) kind {
	n := r.IntN(100)
	for k := range kinds {
		if n -= kinds[k].share; n < 0 {
			return kind(k)
		}
	}
	panic("the shares of the kinds are not 100 together") // a bug of the table
}

// fill gives p the bodies of its kind.
func (p *plan) fill(r *rand.Rand) {
	small := func() int64 { return 1 + r.Int64N(16<<10) }
	p.request = content{seed: r.Uint64(), size: small()}
	p.answer = content{seed: r.Uint64(), size: small()}
	p.chunked = r.IntN(4) == 0
	p.declared = r.IntN(2) == 0
	switch p.kind {
	case eventStream:
		p.answer.form, p.answer.size, p.declared = eventForm, int64(eventSize)*(5+r.Int64N(60)), false
		p.pace = time.Duration(r.IntN(30)) * time.Millisecond
	case get:
		p.method, p.request.size = http.MethodGet, 0
		p.answer.size *= 4
	case head:
		p.method, p.request.size, p.declared = http.MethodHead, 0, true
	case gzipPost:
		p.request.form, p.answer.form = gzipForm, gzipForm
	case upload1:
		p.request.size = mib
	case upload10:
		p.request.size = maxBody
	case download10:
		p.answer.size = 10 * mib
	}
	p.chunked = p.chunked && p.request.size > 0
}
