package main

import (
	"bytes"
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

// metrics counts what the proxy does. Recording takes no lock: every figure is an atomic of its
// own, and sums are made when they are written.
type metrics struct {
	byStatus          [1000]atomic.Pointer[statusMetrics]
	ttfb              histogram
	errors            [len(errorTypes)]atomic.Uint64
	retries           atomic.Uint64
	startTime         time.Time
	version, revision string
	registered        []func(*encoder)
}

// statusMetrics are the figures of the requests that ended with one status.
type statusMetrics struct {
	requests [len(methods) + 1]atomic.Uint64 // the last for any other method
	duration histogram
}

// methods are the values of the label method; others are counted as "other".
var methods = [...]string{
	http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch,
	http.MethodDelete, http.MethodConnect, http.MethodOptions, http.MethodTrace,
}

// durationBuckets are the upper bounds of the histograms' buckets, in seconds: from a refused request
// to the longest that SDKs wait for a non-streaming answer.
var durationBuckets = [...]float64{
	0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600,
}

// quantiles are those of proxy_request_duration_quantiles_seconds.
var quantiles = [...]float64{0.5, 0.9, 0.99, 0.999}

// newMetrics returns metrics that are all zero.
func newMetrics(version, revision string) *metrics {
	return &metrics{startTime: time.Now(), version: version, revision: revision}
}

const metricsContentType = "text/plain; version=0.0.4; charset=utf-8"

func (m *metrics) gauge(name, help string, value func() (float64, bool)) {
	m.registered = append(m.registered, func(e *encoder) {
		if v, ok := value(); ok {
			e.single(name, "gauge", help, v)
		}
	})
}
func (m *metrics) counter(name, help string, value func() float64) {
	m.registered = append(m.registered, func(e *encoder) { e.single(name, "counter", help, value()) })
}
func tailnetGauges(t *tailnet, register func(name, help string, value func() (float64, bool))) {
	state := func() (now tailnetState, connected bool) {
		if t != nil {
			now = t.current()
		}
		return now, t != nil && now.problem == nil
	}
	register("tailnet_connected", "1 while tailscaled has its connection to the tailnet, else 0.", func() (float64, bool) { _, c := state(); return boolGauge(c), true })
	register("tailnet_control_online", "1 while tailscaled reaches its coordination server, else 0; traffic flows without.", func() (float64, bool) { n, c := state(); return boolGauge(c && n.online), true })
	register("tailnet_key_expiry_timestamp_seconds", "When the node key expires, in Unix time; absent if it never does.", func() (float64, bool) {
		n, _ := state()
		return float64(n.keyExpiry.Unix()), !n.keyExpiry.IsZero()
	})
}

// requestDone records a finished request; status is from 100 to 999.
func (m *metrics) requestDone(status int, method string, elapsed time.Duration) {
	s := m.byStatus[status].Load()
	if s == nil {
		m.byStatus[status].CompareAndSwap(nil, new(statusMetrics))
		s = m.byStatus[status].Load()
	}
	i := slices.Index(methods[:], method)
	if i < 0 {
		i = len(methods)
	}
	s.requests[i].Add(1)
	s.duration.observe(elapsed)
}

// firstByte records the time from a request's arrival to its answer's headers.
func (m *metrics) firstByte(elapsed time.Duration) { m.ttfb.observe(elapsed) }

// upstreamError records a failure of the given type.
func (m *metrics) upstreamError(t errorType) { m.errors[slices.Index(errorTypes[:], t)].Add(1) }

// requestsTotal is the number of finished requests.
func (m *metrics) requestsTotal() (n uint64) {
	for i := range m.byStatus {
		if s := m.byStatus[i].Load(); s != nil {
			for j := range s.requests {
				n += s.requests[j].Load()
			}
		}
	}
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
	buckets [len(durationBuckets) + 1]atomic.Uint64 // the last has no upper bound
	nanos   atomic.Int64                            // the sum of all durations
}

// observe adds d.
func (h *histogram) observe(d time.Duration) {
	i, _ := slices.BinarySearch(durationBuckets[:], d.Seconds())
	h.buckets[i].Add(1)
	h.nanos.Add(int64(d))
}

// snapshot returns the counts up to each bound, the last being the count of all, and the sum in seconds.
func (h *histogram) snapshot() (cumulative [len(durationBuckets) + 1]uint64, sum float64) {
	var n uint64
	for i := range h.buckets {
		n += h.buckets[i].Load()
		cumulative[i] = n
	}
	return cumulative, time.Duration(h.nanos.Load()).Seconds()
}

// quantile estimates the q-quantile as Prometheus' histogram_quantile does: linearly within its
// bucket, and the highest bound if it lies above that. NaN without observations.
func quantile(q float64, cumulative []uint64) float64 {
	total := cumulative[len(cumulative)-1]
	if total == 0 {
		return math.NaN()
	}
	rank := q * float64(total)
	i := slices.IndexFunc(cumulative, func(n uint64) bool { return float64(n) >= rank })
	if i >= len(durationBuckets) {
		return durationBuckets[len(durationBuckets)-1]
	}
	var lower, below float64
	if i > 0 {
		lower, below = durationBuckets[i-1], float64(cumulative[i-1])
	}
	within := float64(cumulative[i]) - below
	return lower + (durationBuckets[i]-lower)*(rank-below)/within
}

func (p *metrics) page() []byte {
	var e encoder
	p.writeRequests(&e)
	for _, f := range p.registered {
		f(&e)
	}
	p.writeBuildInfo(&e)
	writeProcess(&e, p.startTime)
	writeRuntime(&e)
	return e.Bytes()
}

// writeRequests writes what was counted per request.
func (m *metrics) writeRequests(e *encoder) {
	e.family("proxy_requests_total", "counter", "Completed proxy requests, by status sent (499: the client left) and method.")
	m.eachStatus(func(status string, s *statusMetrics) {
		for i := range s.requests {
			if n := s.requests[i].Load(); n > 0 {
				method := "other"
				if i < len(methods) {
					method = methods[i]
				}
				e.sample("", float64(n), "status", status, "method", method)
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
	e.family("proxy_time_to_first_byte_seconds", "histogram", "Time from a request's arrival to the upstream's response headers.")
	e.histogram(&m.ttfb)

	e.family("proxy_upstream_errors_total", "counter", "Failed requests, by what failed.")
	for i, t := range errorTypes {
		e.sample("", float64(m.errors[i].Load()), "error_type", string(t))
	}
	e.single("proxy_upstream_retries_total", "counter", "Attempts made again after a timeout or a connection failure.", float64(m.retries.Load()))
}

// eachStatus calls f for each status that was counted, in ascending order.
func (m *metrics) eachStatus(f func(status string, s *statusMetrics)) {
	for i := range m.byStatus {
		if s := m.byStatus[i].Load(); s != nil {
			f(strconv.Itoa(i), s)
		}
	}
}

// writeBuildInfo writes which program this is.
func (m *metrics) writeBuildInfo(e *encoder) {
	e.family("proxy_build_info", "gauge", "Always 1; the labels say which build this is.")
	e.sample("", 1, "version", m.version, "revision", m.revision, "go_version", runtime.Version())
}

// writeProcess writes the customary process_* metrics, as far as the system shows them in /proc.
func writeProcess(e *encoder, started time.Time) {
	e.single("process_start_time_seconds", "gauge", "Start time of the process, in Unix time.", float64(started.UnixMilli())/1e3)
	e.single("process_cpu_seconds_total", "counter", "User and system CPU time spent.", cpuSeconds())
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		e.single("process_open_fds", "gauge", "Open file descriptors.", float64(len(entries)-1)) // one is ReadDir's own
	}
	if limit, ok := maxFDs(); ok {
		e.single("process_max_fds", "gauge", "Limit of open file descriptors.", limit)
	}
	if statm, err := os.ReadFile("/proc/self/statm"); err == nil {
		if pages := strings.Fields(string(statm)); len(pages) > 1 {
			size, _ := strconv.ParseFloat(pages[0], 64)
			resident, _ := strconv.ParseFloat(pages[1], 64)
			page := float64(os.Getpagesize())
			e.single("process_virtual_memory_bytes", "gauge", "Virtual memory size.", size*page)
			e.single("process_resident_memory_bytes", "gauge", "Resident memory size.", resident*page)
		}
	}
}

// writeRuntime writes the go_* basics, under the names that Prometheus' own Go client gives them.
func writeRuntime(e *encoder) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m) // stops the world for some 50 µs; package runtime/metrics would not, but takes 28 KB
	e.family("go_info", "gauge", "Always 1; the label says which Go built the program.")
	e.sample("", 1, "version", runtime.Version())
	e.single("go_goroutines", "gauge", "Goroutines that exist.", float64(runtime.NumGoroutine()))
	e.single("go_sched_gomaxprocs_threads", "gauge", "Threads that may run Go code at once.", float64(runtime.GOMAXPROCS(0)))
	e.single("go_memstats_heap_alloc_bytes", "gauge", "Heap bytes in use.", float64(m.HeapAlloc))
	e.single("go_memstats_heap_released_bytes", "gauge", "Heap bytes returned to the system.", float64(m.HeapReleased))
	e.single("go_memstats_sys_bytes", "gauge", "Bytes obtained from the system.", float64(m.Sys))
	e.single("go_memstats_alloc_bytes_total", "counter", "Heap bytes allocated since the start.", float64(m.TotalAlloc))
	e.single("go_memstats_mallocs_total", "counter", "Heap objects allocated since the start.", float64(m.Mallocs))
	e.single("go_memstats_next_gc_bytes", "gauge", "Heap size at which the next garbage collection ends.", float64(m.NextGC))
	e.single("go_gc_cycles_total_gc_cycles_total", "counter", "Garbage collections since the start.", float64(m.NumGC))
	e.single("go_gc_gomemlimit_bytes", "gauge", "Memory limit of the runtime (GOMEMLIMIT).", float64(debug.SetMemoryLimit(-1)))
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
	separator := "{"
	for i := 0; i+1 < len(labels); i += 2 {
		e.WriteString(separator + labels[i] + `="` + escapeLabel.Replace(labels[i+1]) + `"`)
		separator = ","
	}
	if len(labels) > 0 {
		e.WriteByte('}')
	}
	e.WriteString(" " + formatFloat(value) + "\n")
}

// histogram writes the samples of h.
func (e *encoder) histogram(h *histogram, labels ...string) {
	cumulative, sum := h.snapshot()
	for i, n := range cumulative {
		bound := math.Inf(1)
		if i < len(durationBuckets) {
			bound = durationBuckets[i]
		}
		e.sample("_bucket", float64(n), append(labels[:len(labels):len(labels)], "le", formatFloat(bound))...)
	}
	e.sample("_sum", sum, labels...)
	e.sample("_count", float64(cumulative[len(cumulative)-1]), labels...)
}

var (
	escapeHelp  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
	escapeLabel = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
)

// formatFloat writes f as the format has it: +Inf, -Inf, NaN, or the shortest exact decimal.
func formatFloat(f float64) string {
	switch {
	case math.IsInf(f, 1):
		return "+Inf"
	case math.IsInf(f, -1):
		return "-Inf"
	}
	return strconv.FormatFloat(f, 'g', -1, 64)
}

// boolGauge is 1 for true and 0 for false.
func boolGauge(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// cpuSeconds is the CPU time that the process has used.
func cpuSeconds() float64 {
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
}

// maxFDs is the limit of open file descriptors.
func maxFDs() (limit float64, ok bool) {
	var l syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l) != nil {
		return 0, false
	}
	return float64(l.Cur), true
}
