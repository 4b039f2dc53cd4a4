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
	sends   int64 // bytes of the request that the client sends
	chunked bool  // the request; else it declares its length

	status   int
	answer   content
	declared bool          // the answer's length; else it has chunks, and its checksum in a trailer
	pace     time.Duration // between two events of the answer
	shows    string        // by an endpoint of the proxy's own

	// What a fault adds.
	reset  bool          // connections end with a TCP reset, else with FIN
	early  bool          // the upstream does not read the request
	silent int           // attempts to which the upstream says nothing
	delay  time.Duration // before the upstream's headers
	cut    int64         // bytes of the answer until it breaks off, or the client leaves
	pause  time.Duration // between two pieces of the request, or until the client leaves
}

const (
	mib = 1 << 20
	// maxBody is max_body_mb of the proxy.
	maxBody = 10 * mib
	// pathPrefix is that of all requests that are to reach the upstream.
	pathPrefix = "/v1/soak/"
)

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

// kinds are what they make of a small POST, and how many of a hundred requests are of each.
var kinds = [...]struct {
	name  string
	share int
	shape func(p *plan, r *rand.Rand)
}{
	smallPost: {"small POST", 40, func(*plan, *rand.Rand) {}},
	eventStream: {"event stream", 20, func(p *plan, r *rand.Rand) {
		p.answer.form, p.answer.size, p.declared = eventForm, int64(eventSize)*(5+r.Int64N(60)), false
		p.pace = time.Duration(r.IntN(30)) * time.Millisecond
	}},
	get: {"GET", 10, func(p *plan, _ *rand.Rand) {
		p.method, p.request.size, p.answer.size = http.MethodGet, 0, 4*p.answer.size
	}},
	head:       {"HEAD", 4, func(p *plan, _ *rand.Rand) { p.method, p.request.size, p.declared = http.MethodHead, 0, true }},
	gzipPost:   {"body that claims to be gzip", 8, func(p *plan, _ *rand.Rand) { p.request.form, p.answer.form = gzipForm, gzipForm }},
	upload1:    {"upload of 1 MiB", 5, func(p *plan, _ *rand.Rand) { p.request.size = mib }},
	upload10:   {"upload of 10 MiB", 3, func(p *plan, _ *rand.Rand) { p.request.size = maxBody }},
	download10: {"answer of 10 MiB", 3, func(p *plan, _ *rand.Rand) { p.answer.size = 10 * mib }},
	ownEndpoint: {"/health, /livez, /metrics", 7, func(p *plan, r *rand.Rand) {
		own := ownEndpoints[r.IntN(len(ownEndpoints))]
		p.method, p.request.size, p.path, p.shows = http.MethodGet, 0, own.path, own.shows
	}},
}

func (k kind) String() string { return kinds[k].name }

// ownEndpoints are answered by the proxy itself, and show this.
var ownEndpoints = [...]struct{ path, shows string }{
	{"/health", `"status":"healthy"`},
	{"/livez", `"status":"alive"`},
	{"/metrics", "\nproxy_requests_in_flight "},
}

// newPlan returns the plan for the request with this number.
func newPlan(seed uint64, number int) plan {
	r := rand.New(rand.NewPCG(seed, uint64(number)))
	p := plan{
		number: number, kind: pickKind(r), method: http.MethodPost, path: pathPrefix + strconv.Itoa(number), status: http.StatusOK,
		request: content{seed: r.Uint64(), size: 1 + r.Int64N(16<<10)},
		answer:  content{seed: r.Uint64(), size: 1 + r.Int64N(16<<10)},
		chunked: r.IntN(4) == 0, declared: r.IntN(2) == 0,
	}
	kinds[p.kind].shape(&p, r)
	p.chunked = p.chunked && p.request.size > 0
	p.sends = p.request.size
	if p.kind == ownEndpoint || r.IntN(100) >= faultShare {
		return p
	}
	var possible []fault
	for f := range faults {
		if fits := faults[f].fits; fits != nil && fits(p) {
			possible = append(possible, fault(f))
		}
	}
	p.fault = possible[r.IntN(len(possible))]
	p.reset = r.IntN(2) == 0
	faults[p.fault].harm(&p, r)
	return p
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
