package main

import (
	"bytes"
	"fmt"
	"math"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// metricsType is the content type of [metrics.page].
const metricsType = "text/plain; version=0.0.4; charset=utf-8"

// metrics counts what the proxy does. Recording takes no lock: every figure is an atomic of its
// own, and sums are made when they are written.
type metrics struct {
	byStatus   [1000]atomic.Pointer[statusMetrics]
	ttfb       histogram
	errors     [len(errorTypes)]atomic.Uint64
	retries    atomic.Uint64
	rateLimits [len(rateLimitStatuses)]atomic.Uint64
	began      time.Time
	build      []string // labels of proxy_build_info
	owned      []figure // in the order of the page
}

// figure is a metric without labels whose value its owner knows.
type figure struct {
	name, kind, help string
	value            func() (v float64, ok bool)
}

// statusMetrics are the figures of the requests that ended with one status.
type statusMetrics struct {
	requests [len(methods)]atomic.Uint64
	duration histogram
}

// methods are the values of the label method; the last counts any other.
var methods = [...]string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
	http.MethodDelete, http.MethodConnect, http.MethodOptions, http.MethodTrace, "other",
}

// rateLimitStatuses are what the API says of a caller's rate limits; the last counts any other word.
var rateLimitStatuses = [...]string{"allowed", "allowed_warning", "rejected", "other"}

// durationBuckets are the upper bounds of the histograms' buckets, in seconds: from a refused request
// to the longest that SDKs wait for a non-streaming answer, and beyond.
var durationBuckets = [...]float64{
	0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, math.Inf(1),
}

// quantiles are those of proxy_request_duration_quantiles_seconds.
var quantiles = [...]float64{0.5, 0.9, 0.99, 0.999}

// newMetrics returns metrics that are all zero, of a program that was built as release from commit.
func newMetrics(release, commit string) *metrics {
	return &metrics{began: time.Now(), build: []string{"version", release, "revision", commit, "go_version", runtime.Version()}}
}

// gauge adds a metric to the page, whose value is asked for at each scrape; it is left out if value
// says so. All are to be added before the first scrape.
func (m *metrics) gauge(name, help string, value func() (v float64, ok bool)) {
	m.owned = append(m.owned, figure{name, "gauge", help, value})
}

// counter is gauge for what only grows.
func (m *metrics) counter(name, help string, value func() (v float64, ok bool)) {
	m.owned = append(m.owned, figure{name, "counter", help, value})
}

// requestDone records a finished request; status is from 100 to 999.
func (m *metrics) requestDone(status int, method string, elapsed time.Duration) {
	s := m.byStatus[status].Load()
	if s == nil {
		m.byStatus[status].CompareAndSwap(nil, new(statusMetrics))
		s = m.byStatus[status].Load()
	}
	s.requests[indexOrLast(methods[:], method)].Add(1)
	s.duration.observe(elapsed)
}

// indexOrLast returns where value is in values, the last of which stands for any other.
func indexOrLast(values []string, value string) int {
	if i := slices.Index(values, value); i >= 0 {
		return i
	}
	return len(values) - 1
}

// rateLimitStatus records an answer's anthropic-ratelimit-unified-status.
func (m *metrics) rateLimitStatus(status string) {
	m.rateLimits[indexOrLast(rateLimitStatuses[:], status)].Add(1)
}

// firstByte records the time from a request's arrival to its answer's headers.
func (m *metrics) firstByte(elapsed time.Duration) { m.ttfb.observe(elapsed) }

// upstreamError records a failure of the given type.
func (m *metrics) upstreamError(t errorType) { m.errors[slices.Index(errorTypes[:], t)].Add(1) }

// requestsTotal is the number of finished requests.
func (m *metrics) requestsTotal() (n uint64) {
	m.eachStatus(func(_ string, s *statusMetrics) {
		for i := range s.requests {
			n += s.requests[i].Load()
		}
	})
	return n
}

// errorsTotal is the number of failures of all types.
func (m *metrics) errorsTotal() (n uint64) {
	for i := range m.errors {
		n += m.errors[i].Load()
	}
	return n
}

// histogram counts durations in durationBuckets, each in its own bucket only.
type histogram struct {
	buckets [len(durationBuckets)]atomic.Uint64
	nanos   atomic.Int64 // the sum of all durations
}

// observe adds d.
func (h *histogram) observe(d time.Duration) {
	i, _ := slices.BinarySearch(durationBuckets[:], d.Seconds())
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// snapshot returns the counts up to each bound, the last being the count of all, and the sum in seconds.
func (h *histogram) snapshot() (cumulative [len(durationBuckets)]uint64, sum float64) {
	var n uint64
	for i := range h.buckets {
		n += h.buckets[i].Load()
		cumulative[i] = n
	}
	return cumulative, time.Duration(h.nanos.Load()).Seconds()
}

// quantile estimates the q-quantile as Prometheus' histogram_quantile does: linearly within its
// bucket, and the highest finite bound if it lies above that. NaN without observations.
func quantile(q float64, cumulative []uint64) float64 {
	total := cumulative[len(cumulative)-1]
	if total == 0 {
		return math.NaN()
	}
	rank := q * float64(total)
	i := slices.IndexFunc(cumulative, func(n uint64) bool { return float64(n) >= rank })
	if i == len(durationBuckets)-1 {
		return durationBuckets[i-1]
	}
	var lower, below float64
	if i > 0 {
		lower, below = durationBuckets[i-1], float64(cumulative[i-1])
	}
	within := float64(cumulative[i]) - below
	return lower + (durationBuckets[i]-lower)*(rank-below)/within
}

// page returns all metrics in Prometheus' text format.
func (m *metrics) page() []byte {
	var e encoder
	m.writeRequests(&e)
	e.family("proxy_time_to_first_byte_seconds", "histogram", "Time from a request's arrival to the upstream's response headers.")
	e.histogram(&m.ttfb)
	e.family("proxy_upstream_errors_total", "counter", "Failed requests, by what failed.")
	for i, t := range errorTypes {
		e.sample("", float64(m.errors[i].Load()), "error_type", string(t))
	}
	e.single("proxy_upstream_retries_total", "counter", "Attempts made again after a timeout or a connection failure.", float64(m.retries.Load()))
	e.family("proxy_upstream_ratelimit_status_total", "counter", "Answers that tell of their caller's plan windows, by what they say (anthropic-ratelimit-unified-status).")
	for i, status := range rateLimitStatuses {
		e.sample("", float64(m.rateLimits[i].Load()), "status", status)
	}
	for _, f := range m.owned {
		if v, ok := f.value(); ok {
			e.single(f.name, f.kind, f.help, v)
		}
	}
	e.family("proxy_build_info", "gauge", "Always 1; the labels say which build this is.")
	e.sample("", 1, m.build...)
	e.family("go_info", "gauge", "Always 1; the label says which Go built the program.")
	e.sample("", 1, "version", runtime.Version())
	m.writeProcess(&e)
	return e.Bytes()
}

// writeRequests writes what was counted by status.
func (m *metrics) writeRequests(e *encoder) {
	e.family("proxy_requests_total", "counter", "Completed proxy requests, by status sent (499: the client left) and method.")
	m.eachStatus(func(status string, s *statusMetrics) {
		for i := range s.requests {
			if n := s.requests[i].Load(); n > 0 {
				e.sample("", float64(n), "status", status, "method", methods[i])
			}
		}
	})
	e.family("proxy_request_duration_seconds", "histogram", "Time from a request's arrival to the end of its answer.")
	m.eachStatus(func(status string, s *statusMetrics) { e.histogram(&s.duration, "status", status) })

	e.family("proxy_request_duration_quantiles_seconds", "summary", "Quantiles since the start, estimated from proxy_request_duration_seconds.")
	m.eachStatus(func(status string, s *statusMetrics) {
		cumulative, sum := s.duration.snapshot()
		for _, q := range quantiles {
			e.sample("", quantile(q, cumulative[:]), "status", status, "quantile", formatFloat(q))
		}
		e.sample("_sum", sum, "status", status)
		e.sample("_count", float64(cumulative[len(cumulative)-1]), "status", status)
	})
}

// eachStatus calls f for each status that was counted, in ascending order.
func (m *metrics) eachStatus(f func(status string, s *statusMetrics)) {
	for i := range m.byStatus {
		if s := m.byStatus[i].Load(); s != nil {
			f(strconv.Itoa(i), s)
		}
	}
}

// writeProcess writes the customary process_* metrics and the go_* basics, under the names that Prometheus' own
// Go client gives them.
func (m *metrics) writeProcess(e *encoder) {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory) // stops the world for some 50 µs; package runtime/metrics would not, but takes 28 KB
	var spent syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &spent)
	var files syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	fds, _ := os.ReadDir("/proc/self/fd") // one is its own
	size, resident, page := -1.0, -1.0, float64(os.Getpagesize())
	statm, _ := os.ReadFile("/proc/self/statm")
	fmt.Sscan(string(statm), &size, &resident)
	for _, row := range []struct {
		name, kind, help string
		value            float64 // negative where the system has no /proc
	}{
		{"process_start_time_seconds", "gauge", "Start time of the process, in Unix time.", float64(m.began.UnixMilli()) / 1e3},
		{"process_cpu_seconds_total", "counter", "User and system CPU time spent.", float64(spent.Utime.Nano()+spent.Stime.Nano()) / 1e9},
		{"process_open_fds", "gauge", "Open file descriptors.", float64(len(fds) - 1)},
		{"process_max_fds", "gauge", "Limit of open file descriptors.", float64(files.Cur)},
		{"process_virtual_memory_bytes", "gauge", "Virtual memory size.", size * page},
		{"process_resident_memory_bytes", "gauge", "Resident memory size.", resident * page},
		{"go_goroutines", "gauge", "Goroutines that exist.", float64(runtime.NumGoroutine())},
		{"go_sched_gomaxprocs_threads", "gauge", "Threads that may run Go code at once.", float64(runtime.GOMAXPROCS(0))},
		{"go_memstats_heap_alloc_bytes", "gauge", "Heap bytes in use.", float64(memory.HeapAlloc)},
		{"go_memstats_heap_released_bytes", "gauge", "Heap bytes returned to the system.", float64(memory.HeapReleased)},
		{"go_memstats_sys_bytes", "gauge", "Bytes obtained from the system.", float64(memory.Sys)},
		{"go_memstats_alloc_bytes_total", "counter", "Heap bytes allocated since the start.", float64(memory.TotalAlloc)},
		{"go_memstats_mallocs_total", "counter", "Heap objects allocated since the start.", float64(memory.Mallocs)},
		{"go_memstats_next_gc_bytes", "gauge", "Heap size at which the next garbage collection ends.", float64(memory.NextGC)},
		{"go_gc_cycles_total_gc_cycles_total", "counter", "Garbage collections since the start.", float64(memory.NumGC)},
		{"go_gc_gomemlimit_bytes", "gauge", "Memory limit of the runtime (GOMEMLIMIT).", float64(debug.SetMemoryLimit(-1))},
	} {
		if row.value >= 0 {
			e.single(row.name, row.kind, row.help, row.value)
		}
	}
}

// encoder writes Prometheus' text exposition format 0.0.4.
type encoder struct {
	bytes.Buffer
	name string // of the family being written
}

// family begins a metric family; its samples follow.
func (e *encoder) family(name, kind, help string) {
	e.name = name
	e.WriteString("# HELP " + name + " " + escapeHelp.Replace(help) + "\n# TYPE " + name + " " + kind + "\n")
}

// single writes a family of one sample without labels.
func (e *encoder) single(name, kind, help string, value float64) {
	e.family(name, kind, help)
	e.sample("", value)
}

// sample writes one sample of the family: its name's suffix, value, and labels as name, value, …
func (e *encoder) sample(suffix string, value float64, labels ...string) {
	e.WriteString(e.name + suffix)
	next, end := "{", ""
	for i := 0; i+1 < len(labels); i += 2 {
		e.WriteString(next + labels[i] + `="` + escapeLabel.Replace(labels[i+1]) + `"`)
		next, end = ",", "}"
	}
	e.WriteString(end + " " + formatFloat(value) + "\n")
}

// histogram writes the samples of h.
func (e *encoder) histogram(h *histogram, labels ...string) {
	cumulative, sum := h.snapshot()
	for i, n := range cumulative {
		e.sample("_bucket", float64(n), append(labels[:len(labels):len(labels)], "le", formatFloat(durationBuckets[i]))...)
	}
	e.sample("_sum", sum, labels...)
	e.sample("_count", float64(cumulative[len(cumulative)-1]), labels...)
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// formatFloat writes f as the format has it: +Inf, -Inf, NaN, or the shortest exact decimal.
func formatFloat(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
