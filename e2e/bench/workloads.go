package main

import (
	"slices"
	"strings"
)

// A workload is one kind of work and what is reported of it.
type workload struct {
	name      string
	conns     int // clients at once, each with a connection of its own
	open      func(client) (session, error)
	megabytes float64 // of a request or its answer
	offered   float64 // percent of the full rate, in requests at random times; 0: a client asks again as soon as it is answered
	quick     bool    // part of a quick run
	columns   []string
	title     string
}

// figures are what was measured, by name. NaN is unknown.
type figures map[string]float64

// The figures with their units.
const (
	cpuEach     = "CPU µs each" // request or event
	perSecond   = "number/s"    // of them
	megabytes   = "MB/s"
	p50         = "p50 ms"
	p99         = "p99 ms"
	added       = "added " // before another figure: in comparison with direct
	kbPerStream = "PSS KB/stream"
	mibInAll    = "PSS MiB"
	startTime   = "start ms" // to listening
	idleRSS     = "idle RSS MB"
	idlePSS     = "idle PSS MB"
	binarySize  = "binary MB"
)

var (
	requestColumns  = []string{cpuEach, perSecond, p50, p99}
	transferColumns = []string{megabytes, cpuEach}
	streamColumns   = []string{cpuEach, perSecond, p50, p99, added + p50, added + p99, kbPerStream, mibInAll}
)

var (
	small = exchange{"POST", smallPath, 2 << 10, smallAnswerSize}
	post1 = exchange{"POST", smallPath, 1 << 20, smallAnswerSize}
	// The proxy buffers requests, and four of these fit its budget.
	post10 = exchange{"POST", smallPath, 10 << 20, smallAnswerSize}
	get10  = exchange{"GET", largePath, 0, largeAnswerSize}
)

const (
	smallTitle  = "small requests: 2 KiB POST, 1 KiB answer"
	quotaTitle  = "small requests with a CPU limit of 500m, of the full rate "
	streamTitle = "event streams, 10 events/s each"
)

// workloads are all there are, in the order of the tables. Under a quota, requests that come one by one cost more than those of
// a queue that is never empty.
var workloads = []workload{
	{name: "small1", conns: 1, open: small.open, columns: requestColumns, title: smallTitle},
	{name: "small8", conns: 8, open: small.open, columns: requestColumns, title: smallTitle},
	{name: "small32", conns: 32, open: small.open, columns: requestColumns, quick: true, title: smallTitle},
	{name: "small256", conns: 256, open: small.open, columns: requestColumns, title: smallTitle},
	{name: "post1", conns: 4, open: post1.open, megabytes: 1.049, columns: transferColumns, title: "1 MiB POST"},
	{name: "post10", conns: 4, open: post10.open, megabytes: 10.49, columns: transferColumns, quick: true, title: "10 MiB POST"},
	{name: "get10", conns: 4, open: get10.open, megabytes: 10.49, columns: transferColumns, title: "10 MiB answer"},
	{name: "streams500", conns: 500, open: stream, columns: streamColumns, quick: true, title: streamTitle},
	{name: "streams2000", conns: 2000, open: stream, columns: streamColumns, title: streamTitle},
	{name: "quota50", conns: 256, open: small.open, offered: 50, columns: requestColumns, title: quotaTitle + "1/2"},
	{name: "quota25", conns: 256, open: small.open, offered: 25, columns: requestColumns, title: quotaTitle + "1/4"},
}

// processWork is no work of its own: each start of a contestant yields its figures.
var processWork = workload{name: "process", title: "the process itself", columns: []string{startTime, idleRSS, idlePSS, binarySize}}

// isQuota reports whether work is for contestants with a quota, and for no others.
func isQuota(work string) bool { return strings.HasPrefix(work, "quota") }

// subject is the contestant whose figures the others are compared with.
func subject(work string) string {
	if isQuota(work) {
		return limitedOne
	}
	return ours
}

// workloads are those that o asks for.
func (o options) workloads() []workload {
	return slices.DeleteFunc(slices.Clone(workloads), func(w workload) bool {
		if o.work != nil {
			return !slices.Contains(o.work, w.name)
		}
		return o.quick && !w.quick
	})
}
