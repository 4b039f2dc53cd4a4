package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"time"
)

// A runner measures a target for d and returns a figure for each of the workload's
// columns; NaN is unknown.
type runner func(ctx context.Context, t *target, d time.Duration) ([]float64, error)

// A workload is one kind of work and what is measured of it.
type workload struct {
	name    string
	title   string
	columns []string // figures with their units
	quick   bool     // part of a quick run
	run     runner
}

// The figures.
const (
	cpuPerRequest = "CPU µs/request"
	perSecond     = "requests/s"
	quotaUsed     = "quota used %"
	p50           = "p50 ms"
	p99           = "p99 ms"
	megabytes     = "MB/s"
	cpuPerMB      = "CPU ms/MB"
	cpuPerEvent   = "CPU µs/event"
	arrived       = "arrived %" // of the events that were due; below 100 the machine was too busy
	addedP50      = "added p50 ms"
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

// processName names the pseudo workload whose figures every start yields.
const processName = "process"

func processWorkload() workload {
	return workload{name: processName, title: "the process itself", columns: []string{startTime, idleRSS, idlePSS, binarySize}}
}

// processFigures are the figures of processWorkload.
func (t *target) processFigures() []float64 {
	if t.cmd == nil {
		return []float64{math.NaN(), math.NaN(), math.NaN(), math.NaN()}
	}
	return []float64{milliseconds(t.start), t.idle.rss / 1e6, t.idle.pss / 1e6, float64(t.size) / 1e6}
}

// workloads are all there are, in the order of the tables.
func workloads() []workload {
	var all []workload
	for _, conns := range []int{1, 8, 32, 256} {
		all = append(all, workload{
			name: fmt.Sprintf("small%d", conns), columns: requestColumns, quick: conns == 32,
			title: fmt.Sprintf("small requests: 2 KiB POST, 1 KiB answer, %d connections", conns),
			run:   measureRequests(small(conns)),
		})
	}
	for _, mib := range []int{1, 10} {
		all = append(all, workload{
			name: fmt.Sprintf("post%d", mib), columns: transferColumns, quick: mib == 10,
			title: fmt.Sprintf("large requests: %d MiB POST, %d connections", mib, largeConns),
			run:   measureTransfer(upload(mib << 20)),
		})
	}
	all = append(all, workload{
		name: "get10", columns: transferColumns,
		title: fmt.Sprintf("large answers: 10 MiB, %d connections", largeConns),
		run:   measureTransfer(download()),
	})
	for _, n := range streamCounts {
		all = append(all, workload{
			name: streamsName(n), columns: streamColumns, quick: n == streamCounts[0],
			title: fmt.Sprintf("%d event streams, %.0f events/s each", n, 1/eventInterval.Seconds()),
			run:   measureStreams(n),
		})
	}
	for _, percent := range quotaLoads {
		all = append(all, workload{
			name: quotaName(percent), columns: quotaColumns, run: measureOffered(percent),
			title: fmt.Sprintf("small requests with a CPU limit of %dm, offered at %d %% of the rate that 32 connections reach", quotaMillis, percent),
		})
	}
	return all
}

// streamCounts is how many streams there are at once.
var streamCounts = []int{500, 2000}

func streamsName(n int) string { return fmt.Sprintf("streams%d", n) }

func workloadNames() []string {
	var names []string
	for _, w := range workloads() {
		names = append(names, w.name)
	}
	return names
}

// chosenWorkloads returns the workloads that o asks for.
func chosenWorkloads(o options) []workload {
	return slices.DeleteFunc(workloads(), func(w workload) bool {
		if o.work != nil {
			return !slices.Contains(o.work, w.name)
		}
		return o.quick && !w.quick
	})
}
