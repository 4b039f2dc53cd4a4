package main

import (
	"context"
	"slices"
	"strings"
	"time"
)

// warmUp is how long a contestant works before it is measured, as a fraction of the duration.
const warmUp = 0.4

// figures are what was measured, by column. NaN is unknown.
type figures map[string]float64

// A runner measures a target for d.
type runner func(ctx context.Context, t *target, d time.Duration) (figures, error)

// A workload is one kind of work and what is reported of it.
type workload struct {
	name    string
	columns []string
	quick   bool // part of a quick run
	run     runner
	title   string
}

// The columns: figures with their units.
const (
	cpuPerRequest = "CPU µs/request"
	perSecond     = "requests/s"
	quotaUsed     = "quota used %"
	p50           = "p50 ms"
	p99           = "p99 ms"
	megabytes     = "MB/s"
	cpuPerMB      = "CPU ms/MB"
	cpuPerEvent   = "CPU µs/event"
	arrived       = "arrived %"    // of the events that were due; below 100 the machine was too busy
	addedP50      = "added p50 ms" // to direct's
	addedP99      = "added p99 ms"
	kbPerStream   = "PSS KB/stream"
	mibInAll      = "PSS MiB"
	startTime     = "start ms" // to listening
	idleRSS       = "idle RSS MB"
	idlePSS       = "idle PSS MB"
	binarySize    = "binary MB"
)

var (
	requestColumns  = []string{cpuPerRequest, perSecond, p50, p99}
	quotaColumns    = append(slices.Clone(requestColumns), quotaUsed)
	transferColumns = []string{megabytes, cpuPerMB}
	streamColumns   = []string{cpuPerEvent, arrived, p50, p99, addedP50, addedP99, kbPerStream, mibInAll}
)

// workloads are all there are, in the order of the tables.
var workloads = []workload{
	{"small1", requestColumns, false, small(1).run, "small requests: 2 KiB POST, 1 KiB answer, 1 connection"},
	{"small8", requestColumns, false, small(8).run, "small requests: 2 KiB POST, 1 KiB answer, 8 connections"},
	{"small32", requestColumns, true, small(32).run, "small requests: 2 KiB POST, 1 KiB answer, 32 connections"},
	{"small256", requestColumns, false, small(256).run, "small requests: 2 KiB POST, 1 KiB answer, 256 connections"},
	{"post1", transferColumns, false, large("POST", smallPath, 1<<20, smallAnswerSize).run, "large requests: 1 MiB POST, 4 connections"},
	{"post10", transferColumns, true, large("POST", smallPath, 10<<20, smallAnswerSize).run, "large requests: 10 MiB POST, 4 connections"},
	{"get10", transferColumns, false, large("GET", largePath, 0, largeAnswerSize).run, "large answers: 10 MiB, 4 connections"},
	{"streams500", streamColumns, true, streams(500), "500 event streams, 10 events/s each"},
	{"streams2000", streamColumns, false, streams(2000), "2000 event streams, 10 events/s each"},
	{"quota50", quotaColumns, false, offered(50), "small requests with a CPU limit of 500m, offered at 50 % of the rate that 32 connections reach"},
	{"quota25", quotaColumns, false, offered(25), "small requests with a CPU limit of 500m, offered at 25 % of the rate that 32 connections reach"},
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

func workloadNames() []string {
	var names []string
	for _, w := range workloads {
		names = append(names, w.name)
	}
	return names
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
