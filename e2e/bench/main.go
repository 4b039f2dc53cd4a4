// Bench measures the proxy beside nginx, HAProxy, Caddy and Go's own httputil.ReverseProxy, on the same work, in one run: each
// contestant is a real process on loopback between this one's clients and this one's TLS upstream.
//
//	go -C e2e run ./bench                    everything, about 25 minutes
//	go -C e2e run ./bench -quick             about a minute: have ratios collapsed?
//	go -C e2e run ./bench -only proxy,baseline -baseline OLD -work small32
//	go -C e2e run ./bench -json FILE         with all figures; -from FILE: of these, instead of measuring
//	go -C e2e run ./bench -charts FOLDER     with docs/performance-*.svg
//	go -C e2e run ./bench -cpuprofile FILE   a profile of the proxy under load; -allocs FILE: of all its allocations
//
// Absolute figures depend on the machine and on what else it does: compare contestants of one run. They are measured in turn,
// several rounds of them, in fresh processes; a figure is the median of its rounds, a ratio the median of the rounds' ratios. A
// round waits for a quiet machine; the report says when there was none, and what others used of it meanwhile.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	quick                            bool
	only, work                       []string      // names; nil is all
	rounds                           int           // how often everything is measured
	duration                         time.Duration // of one measurement
	patience                         time.Duration // with a machine that is not quiet
	binary                           string        // of the proxy, instead of building it
	baseline                         string        // another binary of the proxy
	env                              []string      // of the proxy, in addition
	http1                            bool          // the upstream does not offer HTTP/2
	from                             string        // file of figures
	json, charts, cpuProfile, allocs string        // what to write: files, and for charts a folder
}

func parseFlags(flags *flag.FlagSet, args []string) (o options, err error) {
	names := func(to *[]string, known []string) func(string) error {
		return func(s string) error {
			for name := range strings.SplitSeq(s, ",") {
				if !slices.Contains(known, name) {
					return fmt.Errorf("no %q; there are %s", name, strings.Join(known, ", "))
				}
				*to = append(*to, name)
			}
			return nil
		}
	}
	flags.BoolVar(&o.quick, "quick", false, "a choice of the work, briefly; fail when a limit is missed by a factor of 2")
	flags.Func("only", "`contestants`, separated by commas: "+strings.Join(contestantNames(), ", "), names(&o.only, contestantNames()))
	flags.Func("work", "`workloads`, separated by commas: "+strings.Join(workloadNames(), ", "), names(&o.work, workloadNames()))
	flags.IntVar(&o.rounds, "rounds", 5, "how many times to measure (2 with -quick)")
	flags.DurationVar(&o.duration, "duration", 2*time.Second, "length of one measurement (600ms with -quick)")
	flags.DurationVar(&o.patience, "patience", 2*time.Minute, "how long to wait, in all rounds together, for others to leave the machine alone (10s with -quick)")
	flags.StringVar(&o.binary, "binary", "", "measure this `build` of the proxy instead of making one")
	flags.StringVar(&o.baseline, "baseline", "", "another `build` of the proxy, to compare with")
	flags.Func("env", "`KEY=VALUE` in the proxy's environment, such as GOGC=200 (repeatable)", func(s string) error { o.env = append(o.env, s); return nil })
	flags.BoolVar(&o.http1, "http1", false, "the upstream offers HTTP/1.1 only; nginx and HAProxy use that in any case")
	flags.StringVar(&o.from, "from", "", "measure nothing, but report the figures that -json wrote to `file`")
	flags.StringVar(&o.json, "json", "", "write all figures to `file` too")
	flags.StringVar(&o.charts, "charts", "", "draw docs/performance-*.svg into `folder` too")
	flags.StringVar(&o.cpuProfile, "cpuprofile", "", "measure nothing, but write a pprof CPU profile of the proxy under load to `file`")
	flags.StringVar(&o.allocs, "allocs", "", "measure nothing, but write a pprof profile of the proxy's allocations under load to `file`")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	if o.quick {
		brief := map[string]string{"rounds": "2", "duration": "600ms", "patience": "10s"}
		flags.Visit(func(given *flag.Flag) { delete(brief, given.Name) })
		for name, value := range brief {
			err = errors.Join(err, flags.Set(name, value))
		}
	}
	switch {
	case flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q; -h lists what there is", flags.Arg(0))
	case o.rounds < 1 || o.rounds > 100 || o.duration < 100*time.Millisecond || o.duration > time.Minute:
		err = errors.New("-rounds must be from 1 to 100, -duration from 100ms to 1m")
	}
	return o, err
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 3 && args[0] == reverseProxyMode {
		return serveReverseProxy(args[1], args[2])
	}
	o, err := parseFlags(flag.CommandLine, args)
	if err != nil {
		return err
	}
	debug.SetGCPercent(400) // this process' own collections would disturb everyone
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	var r *report
	switch {
	case o.cpuProfile != "":
		return profileProxy(ctx, o, "cpu", o.cpuProfile)
	case o.allocs != "":
		return profileProxy(ctx, o, "allocs", o.allocs)
	case o.from != "":
		r, err = readReport(o.from)
	default:
		r, err = compare(ctx, o, os.Stderr)
	}
	if err != nil {
		return err
	}
	fmt.Print(r.text())
	if o.json != "" {
		err = r.write(o.json)
	}
	if o.charts != "" {
		err = errors.Join(err, r.writeCharts(o.charts))
	}
	if o.quick {
		err = errors.Join(err, collapsed(judge(r)))
	}
	return err
}

// compare measures everything that o asks for.
func compare(ctx context.Context, o options, progress io.Writer) (r *report, err error) {
	chosen, err := resolve(o)
	if err != nil {
		return nil, err
	}
	b, err := newTestbed(o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	r = newReport()
	begun := time.Now()
	for round := range o.rounds {
		say := func(what string) {
			fmt.Fprintf(progress, "\r\033[Kround %d of %d, %s (%.0f s)", round+1, o.rounds, what, time.Since(begun).Seconds())
		}
		say("waiting for a quiet machine")
		from, before, err := awaitQuiet(ctx, &o.patience)
		if err != nil {
			return nil, err
		}
		for _, w := range o.workloads() {
			say(w.name)
			// Each round begins with another contestant, so that nobody always follows the same one.
			first := round % len(chosen)
			for _, c := range slices.Concat(chosen[first:], chosen[:first]) {
				if isQuota(w.name) != c.quota {
					continue
				}
				if err := b.measure(ctx, c, w, o.duration, r); err != nil {
					return nil, fmt.Errorf("%s, %s: %w", c.name, w.name, err)
				}
			}
		}
		to, err := readMachine()
		if err != nil {
			return nil, err
		}
		r.Others = append(r.Others, noise{Before: before, During: others(from, to)})
	}
	fmt.Fprint(progress, "\r\033[K")
	r.summarize()
	return r, nil
}

// measure runs w on a fresh process of c, once.
func (b *testbed) measure(ctx context.Context, c contestant, w workload, d time.Duration, r *report) error {
	t, err := b.start(c)
	if err != nil {
		return err
	}
	measured, err := t.run(ctx, w, d)
	if err := t.stop(err); err != nil {
		return err
	}
	maps.DeleteFunc(measured, func(column string, _ float64) bool { return !slices.Contains(w.columns, column) })
	r.add(w.name, c.name, measured)
	r.add(processWork.name, c.name, t.idle)
	return nil
}
