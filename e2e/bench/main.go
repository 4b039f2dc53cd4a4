// Bench measures the proxy beside nginx, HAProxy, Caddy and Go's own
// httputil.ReverseProxy, on the same work, in one run: each contestant is a real
// process on loopback between this one's clients and this one's TLS upstream.
//
//	go -C e2e run ./bench                    everything, about 25 minutes
//	go -C e2e run ./bench -quick             about a minute: have ratios collapsed?
//	go -C e2e run ./bench -only proxy,nginx -work small32
//	go -C e2e run ./bench -baseline OLD      with an older binary as a contestant
//	go -C e2e run ./bench -markdown FILE     with docs/performance.md's tables
//	go -C e2e run ./bench -charts FOLDER     with docs/performance-*.svg; -from FILE: of earlier figures
//	go -C e2e run ./bench -cpuprofile FILE   a pprof CPU profile of the proxy under load
//	go -C e2e run ./bench -allocs            its allocations per small request
//
// Absolute figures depend on the machine and on what else it does: compare
// contestants of one run. They are measured in turn, several rounds of them, in
// fresh processes; a figure is the median of its rounds, a ratio the median of
// the rounds' ratios. A round waits for a quiet machine; the report says when there
// was none, and what others used of it meanwhile.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == reverseProxyMode {
		exit(runReverseProxy(os.Args[2:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// exit ends the process with 0, 2 for a bad command line or 1 for any other
// failure.
func exit(err error) {
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		os.Exit(0)
	case errors.Is(err, errUsage):
		os.Exit(2)
	}
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(1)
}

// errUsage is a bad command line, which the flag package has already reported.
var errUsage = errors.New("bad usage")

// options are the command line.
type options struct {
	quick      bool
	only, work []string      // names; nil is all
	rounds     int           // how often everything is measured
	duration   time.Duration // of one measurement
	jsonFile   string
	binary     string   // of the proxy, instead of building it
	baseline   string   // another binary of the proxy
	env        []string // of the proxy, in addition
	cpuProfile string
	allocs     bool
	http1      bool          // the upstream does not offer HTTP/2
	markdown   string        // file
	patience   time.Duration // with a machine that is not quiet
	charts     string        // folder
	from       string        // file of figures
}

// warmUp is how long a contestant works before it is measured, as a fraction of
// the duration.
const warmUp = 0.4

// These bound runs that hang, or a machine that is too slow. A quick run takes
// about a minute on two busy processors.
const (
	timeLimit      = time.Hour
	quickTimeLimit = 3 * time.Minute
)

func parseFlags(args []string, stderr io.Writer) (options, error) {
	o := options{rounds: 5, duration: 2 * time.Second, patience: 2 * time.Minute}
	list := func(to *[]string) func(string) error {
		return func(s string) error { *to = append(*to, strings.Split(s, ",")...); return nil }
	}
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.BoolVar(&o.quick, "quick", false, "a choice of the work, briefly; fail when a limit is missed by a factor of 2")
	flags.Func("only", "`contestants`, separated by commas: "+strings.Join(contestantNames(), ", "), list(&o.only))
	flags.Func("work", "`workloads`, separated by commas: "+strings.Join(workloadNames(), ", "), list(&o.work))
	flags.IntVar(&o.rounds, "rounds", o.rounds, "how many times to measure (2 with -quick)")
	flags.DurationVar(&o.duration, "duration", o.duration, "length of one measurement (600ms with -quick)")
	flags.DurationVar(&o.patience, "patience", o.patience, "how long to wait, in all rounds together, for others to leave the machine alone (10s with -quick)")
	flags.StringVar(&o.jsonFile, "json", "", "write all figures to `file` too")
	flags.StringVar(&o.markdown, "markdown", "", "write docs/performance.md's tables to `file` too")
	flags.StringVar(&o.charts, "charts", "", "draw docs/performance-*.svg into `folder` too")
	flags.StringVar(&o.from, "from", "", "measure nothing, but draw -charts of the figures that -json wrote to `file`")
	flags.StringVar(&o.binary, "binary", "", "measure this `build` of the proxy instead of making one")
	flags.StringVar(&o.baseline, "baseline", "", "another `build` of the proxy, to compare with")
	flags.Func("env", "`KEY=VALUE` in the proxy's environment, such as GOGC=200 (repeatable)", func(s string) error {
		o.env = append(o.env, s)
		return nil
	})
	flags.StringVar(&o.cpuProfile, "cpuprofile", "", "measure nothing, but write a pprof CPU profile of the proxy under load to `file`")
	flags.BoolVar(&o.allocs, "allocs", false, "measure nothing but the proxy's allocations per small request")
	flags.BoolVar(&o.http1, "http1", false, "the upstream offers HTTP/1.1 only; nginx and HAProxy use that in any case")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return o, err
	case err != nil:
		return o, errUsage
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if o.quick && !given["rounds"] {
		o.rounds = 2
	}
	if o.quick && !given["duration"] {
		o.duration = 600 * time.Millisecond
	}
	if o.quick && !given["patience"] {
		o.patience = 10 * time.Second
	}
	if err := o.validate(flags.Args()); err != nil {
		fmt.Fprintln(stderr, "bench:", err)
		return o, errUsage
	}
	return o, nil
}

func (o options) validate(rest []string) error {
	if len(rest) > 0 {
		return fmt.Errorf("unexpected argument %q; -h lists what there is", rest[0])
	}
	if o.rounds < 1 || o.rounds > 100 || o.duration < 100*time.Millisecond || o.duration > time.Minute {
		return errors.New("-rounds must be from 1 to 100, -duration from 100ms to 1m")
	}
	if o.from != "" && o.charts == "" {
		return errors.New("-from is for -charts")
	}
	for _, name := range o.only {
		if !slices.Contains(contestantNames(), name) {
			return fmt.Errorf("-only: no contestant %q; there are %s", name, strings.Join(contestantNames(), ", "))
		}
	}
	for _, name := range o.work {
		if !slices.Contains(workloadNames(), name) {
			return fmt.Errorf("-work: no workload %q; there are %s", name, strings.Join(workloadNames(), ", "))
		}
	}
	return nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	if o.from != "" {
		return redraw(o.from, o.charts)
	}
	if err := raiseFileLimit(); err != nil {
		return err
	}
	debug.SetGCPercent(400) // this process' own collections would disturb everyone
	up, err := startUpstream(!o.http1)
	if err != nil {
		return err
	}
	defer up.close()

	limit := timeLimit
	if o.quick {
		limit = quickTimeLimit
	}
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	var contestants []contestant
	if o.cpuProfile == "" && !o.allocs {
		if contestants, err = resolve(o); err != nil { // outside the limit: it may compile
			return err
		}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the run took longer than %v", limit))
	defer cancel()
	switch {
	case o.cpuProfile != "":
		return profileCPU(ctx, o, up)
	case o.allocs:
		return countAllocs(ctx, o, up, stdout)
	}
	return compare(ctx, o, up, contestants, stdout, stderr)
}

// compare measures everything that o asks for and reports it.
func compare(ctx context.Context, o options, up *upstream, contestants []contestant, stdout, stderr io.Writer) error {
	works := chosenWorkloads(o)
	results := newResults(contestants, works)
	begun := time.Now()
	for round := range o.rounds {
		fmt.Fprintf(stderr, "\r\033[Kround %d of %d, waiting for a quiet machine", round+1, o.rounds)
		from, before, err := awaitQuiet(ctx, &o.patience)
		if err != nil {
			return err
		}
		for _, w := range works {
			fmt.Fprintf(stderr, "\r\033[Kround %d of %d, %s (%.0f s)", round+1, o.rounds, w.name, time.Since(begun).Seconds())
			// Each round begins with another contestant, so that nobody always follows the same one.
			for i := range contestants {
				c := contestants[(i+round)%len(contestants)]
				if isQuota(w.name) != c.quota {
					continue
				}
				if err := measure(ctx, o, up, c, w, results); err != nil {
					fmt.Fprintln(stderr)
					return fmt.Errorf("%s, %s: %w", c.name, w.name, err)
				}
			}
		}
		to, err := readMachine()
		if err != nil {
			return err
		}
		results.others = append(results.others, noise{Before: before, During: others(from, to)})
	}
	fmt.Fprint(stderr, "\r\033[K")
	verdicts := judge(results)
	if _, err := io.WriteString(stdout, results.text(verdicts)); err != nil {
		return err
	}
	if o.markdown != "" {
		if err := os.WriteFile(o.markdown, []byte(results.markdown()), 0o644); err != nil {
			return fmt.Errorf("writing the tables: %w", err)
		}
	}
	report := results.report(verdicts)
	if o.jsonFile != "" {
		if err := report.write(o.jsonFile); err != nil {
			return err
		}
	}
	if o.charts != "" {
		if err := writeCharts(o.charts, report.Figures); err != nil {
			return err
		}
	}
	if o.quick {
		return collapsed(verdicts)
	}
	return nil
}

// measure runs w on a fresh process of c, once.
func measure(ctx context.Context, o options, up *upstream, c contestant, w workload, results *results) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	t, err := start(c, up, o.env)
	if err != nil {
		return err
	}
	values, err := w.run(ctx, t, o.duration)
	if err == nil {
		results.add(w.name, c.name, values)
		results.add(processName, c.name, t.processFigures())
	} else {
		err = t.explain(err)
	}
	return errors.Join(err, t.stop())
}

// raiseFileLimit lets this process and its children open as many files as the
// hard limit allows, and fails if that is too few.
func raiseFileLimit() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("reading the limit of open files: %w", err)
	}
	if limit.Max < maxFiles {
		return fmt.Errorf("at most %d open files are allowed here, %d are needed: run 'ulimit -Hn %d' as root first", limit.Max, maxFiles, maxFiles)
	}
	limit.Cur = maxFiles // set in any case: only then does Go hand it down to children
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("raising the limit of open files to %d: %w", maxFiles, err)
	}
	return nil
}
