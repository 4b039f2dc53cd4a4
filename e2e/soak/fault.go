package main

import (
	"math/rand/v2"
	"net/http"
	"time"
)

// faultShare is how many of a hundred requests go wrong.
const faultShare = 25

// fault is what goes wrong with a request.
type fault int

// The faults, by whose they are.
const (
	noFault fault = iota

	upstreamSlow       // well within the timeout
	upstreamSilent     // no headers, twice
	upstreamSilentOnce // no headers, and then all is well
	upstreamRefuses    // resets the connection or the stream before the headers
	upstreamBreaksOff  // in the middle of the answer
	upstreamFallsSilent
	upstreamFails        // with a status that is an error
	upstreamAnswersEarly // before it has read the request

	clientLeavesUploading
	clientLeavesWaiting // for headers that do not come
	clientLeavesReading
	clientSendsSlowly
	clientFallsSilent
	clientSendsBadChunk
	clientSendsTooMuch
	clientSendsBothFramings // Content-Length beside Transfer-Encoding
	clientSendsTwoLengths

	faultCount
)

var faultNames = [faultCount]string{
	noFault:                 "none",
	upstreamSlow:            "the upstream is slow",
	upstreamSilent:          "the upstream is silent before headers, twice",
	upstreamSilentOnce:      "the upstream is silent before headers, once",
	upstreamRefuses:         "the upstream resets before headers",
	upstreamBreaksOff:       "the upstream breaks off in the answer",
	upstreamFallsSilent:     "the upstream falls silent in the answer",
	upstreamFails:           "the upstream answers 429, 500 or 529",
	upstreamAnswersEarly:    "the upstream answers without reading",
	clientLeavesUploading:   "the client leaves in its upload",
	clientLeavesWaiting:     "the client leaves while it waits",
	clientLeavesReading:     "the client leaves in the answer",
	clientSendsSlowly:       "the client uploads slowly",
	clientFallsSilent:       "the client falls silent in its upload",
	clientSendsBadChunk:     "the client sends a bad chunk",
	clientSendsTooMuch:      "the client sends too large a body",
	clientSendsBothFramings: "the client sends a length and chunks",
	clientSendsTwoLengths:   "the client sends two lengths",
}

func (f fault) String() string { return faultNames[f] }

const (
	// timeout is timeout_secs of the proxy, with one retry.
	timeout = 2 * time.Second
	// retryPause lies between two attempts of the proxy.
	retryPause = 100 * time.Millisecond
	// slowest is how long an upstream that is only slow takes: less than timeout by
	// what a busy machine may add.
	slowest = time.Second
	// slowPieces are the pieces of a slow upload.
	slowPieces = 8
	// slowestPause lies between them.
	slowestPause = 200 * time.Millisecond
)

// possibleFaults are those that can happen to p.
func (p *plan) possibleFaults() []fault {
	all := []fault{upstreamSlow, upstreamSilent, upstreamSilentOnce, upstreamRefuses, clientLeavesWaiting}
	if p.method != http.MethodHead {
		all = append(all, upstreamFails)
		if p.answer.size > 1 {
			all = append(all, upstreamBreaksOff, upstreamFallsSilent, clientLeavesReading)
		}
	}
	if p.request.size > 1 {
		all = append(all, clientLeavesUploading, clientFallsSilent, clientSendsBadChunk, clientSendsBothFramings)
		if !p.chunked {
			all = append(all, clientSendsTwoLengths)
		}
		if p.request.size >= mib {
			all = append(all, upstreamAnswersEarly, clientSendsTooMuch)
		} else {
			all = append(all, clientSendsSlowly)
		}
	}
	return all
}

// failures are the statuses of an upstream that has trouble.
var failures = [...]int{http.StatusTooManyRequests, http.StatusInternalServerError, 529}

// harm has f happen to p.
func (p *plan) harm(f fault, r *rand.Rand) {
	p.fault = f
	p.reset = r.IntN(2) == 0
	upTo := func(d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
	within := func(c content) int64 { return 1 + r.Int64N(c.size-1) }
	switch f {
	case upstreamSlow:
		p.pause = upTo(slowest)
	case upstreamRefuses:
		p.early = r.IntN(2) == 0
	case upstreamBreaksOff, upstreamFallsSilent:
		p.at = within(p.answer)
	case clientLeavesReading:
		if p.answer.form != eventForm && r.IntN(2) == 0 {
			p.answer.size = 10 * mib // more than the sockets hold, so that it is missed
		}
		p.at = within(p.answer)
	case upstreamFails:
		p.status = failures[r.IntN(len(failures))]
	case upstreamAnswersEarly:
		p.early = true
	case clientLeavesUploading, clientFallsSilent:
		p.at = within(p.request)
	case clientSendsBadChunk:
		p.at, p.chunked = within(p.request), true
	case clientLeavesWaiting:
		p.pause = upTo(2*timeout + 3*retryPause) // the pause between the attempts too, and the end
	case clientSendsSlowly:
		p.pause = upTo(slowestPause)
	case clientSendsTooMuch:
		p.request.size = maxBody + 1 + r.Int64N(8<<10)
	case clientSendsBothFramings:
		p.chunked = true
	}
}
