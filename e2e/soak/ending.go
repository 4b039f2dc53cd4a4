package main

import (
	"fmt"
	"net/http"
	"time"
)

// An ending is one way in which a request may end, as the proxy's log has it.
type ending struct {
	status   int
	code     string // of the error; empty: there is none
	attempts int
	least    time.Duration // the request took no less
}

func (e ending) String() string {
	return fmt.Sprintf("status %d %s after %d attempts and %v at least", e.status, e.code, e.attempts, e.least)
}

// The codes of the errors.
const (
	codeTimeout     = "timeout"
	codeConnection  = "connection"
	codeInvalid     = "invalid_request"
	codeRead        = "response_read"
	codeInternal    = "internal"
	codeClientGone  = "client_gone"
	codeSlowRequest = "request_timeout"
	codeSlowReader  = "client_gone, reading" // as logged for a client that is there, and reads nothing
)

// errorTypes are the codes that proxy_upstream_errors_total has.
var errorTypes = [...]string{codeTimeout, codeConnection, codeInvalid, codeRead, codeInternal}

// statusClientGone is the status in log and metrics of a request whose client left.
const statusClientGone = 499

// twice is how long two attempts without headers take.
const twice = 2*timeout + retryPause

// reaches reports whether the request gets to the proxy's handler, and so into log
// and metrics: net/http refuses some itself.
func (p plan) reaches() bool { return p.kind != ownEndpoint && p.fault != clientSendsTwoLengths }

// endings are those that p may have.
func (p plan) endings() []ending {
	timedOut := ending{http.StatusGatewayTimeout, codeTimeout, 2, twice}
	passed := ending{status: p.status, attempts: 1}
	switch p.fault {
	case upstreamSlow:
		passed.least = p.pause
	case upstreamSilent:
		return []ending{timedOut}
	case upstreamSilentOnce:
		passed.attempts, passed.least = 2, timeout+retryPause
	case upstreamRefuses:
		return []ending{{http.StatusBadGateway, codeConnection, 1, 0}}
	case upstreamBreaksOff:
		return []ending{{p.status, codeRead, 1, 0}}
	case upstreamFallsSilent:
		return []ending{{p.status, codeRead, 1, timeout}}
	case clientLeavesUploading:
		return []ending{{statusClientGone, codeClientGone, 0, 0}}
	case clientLeavesWaiting: // in the queue, or in an attempt
		gone := ending{status: statusClientGone, code: codeClientGone}
		first, second := gone, gone
		first.attempts = 1
		second.attempts, second.least = 2, timeout+retryPause
		return []ending{gone, first, second, timedOut}
	case clientLeavesReading: // or the rest is in the sockets' buffers already
		return []ending{passed, {statusClientGone, codeClientGone, 1, 0}}
	case clientFallsSilent:
		return []ending{{http.StatusRequestTimeout, codeSlowRequest, 0, timeout}}
	case clientSendsBadChunk, clientSendsTooMuch:
		return []ending{{http.StatusBadRequest, codeInvalid, 0, 0}}
	}
	return []ending{passed}
}

// lateEndings are those that p may have besides if the machine stood still meanwhile:
// a client, an upstream or the answer to a ping comes too late then. They are counted
// apart, and few may be.
func (p plan) lateEndings() []ending {
	all := []ending{{http.StatusRequestTimeout, codeSlowRequest, 0, timeout}}
	switch p.fault {
	case clientLeavesUploading, clientFallsSilent, clientSendsBadChunk, clientSendsTooMuch:
		return all
	}
	return append(all,
		ending{p.status, "", 2, timeout + retryPause},
		ending{p.status, codeRead, 1, 0},
		ending{p.status, codeRead, 2, timeout + retryPause},
		ending{http.StatusBadGateway, codeConnection, 1, 0},
		ending{http.StatusBadGateway, codeConnection, 2, timeout + retryPause},
		ending{http.StatusGatewayTimeout, codeTimeout, 2, twice},
		ending{statusClientGone, codeSlowReader, 1, timeout},
		ending{statusClientGone, codeSlowReader, 2, 2 * timeout},
	)
}
