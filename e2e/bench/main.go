// Bench measures the proxy beside nginx, HAProxy, Caddy and Go's own httputil.ReverseProxy, on the same work, in one run: each
// contestant is a real process on loopback between this one's clients and this one's TLS upstream.
//
//	go -C e2e run ./bench                    everything, about 25 minutes
//	go -C e2e run ./bench -quick             about a minute: have ratios collapsed?
//	go -C e2e run ./bench -only proxy,baseline -baseline OLD -work small32
//	go -C e2e run ./bench -chart FILE        with a chart, as docs/performance.svg
//	go -C e2e run ./bench -cpuprofile FILE   a profile of the proxy under load
//
// Absolute figures depend on the machine and on what else it does: compare contestants of one run. They are measured in turn,
// several rounds of them, in fresh processes; a figure is the median of its rounds, a ratio the median of the rounds' ratios. A
// round waits for a quiet machine; the report says when there was none, and what others used of it meanwhile.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
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
	quick            bool
	only, work       []string      // names; nil is all
	rounds           int           // how often everything is measured
	duration         time.Duration // of one measurement
	patience         time.Duration // with a machine that is not quiet
	binary, baseline string        // of the proxy, instead of building it; and another one
	chart, profile   string        // files to write
}

func parseFlags(args []string) (o options, err error) {
	list := func(names *[]string) func(string) error {
		return func(s string) error { *names = strings.Split(s, ","); return nil }
	}
	flag.BoolVar(&o.quick, "quick", false, "a choice of the work, briefly; fail when a limit is missed by a factor of 2")
	flag.Func("only", "`contestants`, separated by commas: those of contestants.go", list(&o.only))
	flag.Func("work", "`workloads`, separated by commas: those of workloads.go", list(&o.work))
	flag.IntVar(&o.rounds, "rounds", 0, "how many times to measure (default 5; 2 with -quick)")
	flag.DurationVar(&o.duration, "duration", 0, "length of one measurement (default 2s; 600ms with -quick)")
	flag.DurationVar(&o.patience, "patience", 0,
		"how long to wait, in all rounds together, for others to leave the machine alone (default 2m; 10s with -quick)")
	flag.StringVar(&o.binary, "binary", "", "measure this `build` of the proxy instead of making one")
	flag.StringVar(&o.baseline, "baseline", "", "another `build` of the proxy, to compare with")
	flag.StringVar(&o.chart, "chart", "", "draw docs/performance.svg, as `file`, too")
	flag.StringVar(&o.profile, "cpuprofile", "", "measure nothing, but write a pprof CPU profile of the proxy under load to `file`")
	if err := flag.CommandLine.Parse(args); err != nil {
		return o, err
	}
	if flag.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q; -h lists what there is", flag.Arg(0))
	}
	for _, name := range slices.Concat(o.only, o.work) {
		if !slices.ContainsFunc(contestants, func(c contestant) bool { return c.name == name }) &&
			!slices.ContainsFunc(workloads, func(w workload) bool { return w.name == name }) {
			return o, fmt.Errorf("there is no contestant or workload %q", name)
		}
	}
	usual := options{rounds: 5, duration: 2 * time.Second, patience: 2 * time.Minute}
	if o.quick {
		usual = options{rounds: 2, duration: 600 * time.Millisecond, patience: 10 * time.Second}
	}
	o.rounds = cmp.Or(o.rounds, usual.rounds)
	o.duration = cmp.Or(o.duration, usual.duration)
	o.patience = cmp.Or(o.patience, usual.patience)
	return o, nil
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) == 3 && args[0] == reverseProxyMode {
		return serveReverseProxy(args[1], args[2])
	}
	o, err := parseFlags(args)
	if err != nil {
		return err
	}
	debug.SetGCPercent(400) // this process' own collections would disturb everyone
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	b, err := newTestbed()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if o.profile != "" {
		return b.profile(ctx, o)
	}
	r, err := b.compare(ctx, o)
	if err != nil {
		return err
	}
	fmt.Print(r.text())
	if o.chart != "" {
		err = r.writeChart(o.chart)
	}
	if o.quick {
		r.judge(func(l limit, value float64, state string) {
			if state == "collapsed" {
				err = errors.Join(err, fmt.Errorf("collapsed: %v, measured %s", l, format(value)))
			}
		})
	}
	return err
}

// compare measures everything that o asks for.
func (b *testbed) compare(ctx context.Context, o options) (*report, error) {
	chosen, err := resolve(o)
	if err != nil {
		return nil, err
	}
	r := newReport()
	begun := time.Now()
	for round := range o.rounds {
		say := func(what string) {
			fmt.Fprintf(os.Stderr, "\r\033[Kround %d of %d, %s (%.0f s)", round+1, o.rounds, what, time.Since(begun).Seconds())
		}
		say("waiting for a quiet machine")
		if err := awaitQuiet(ctx, &o.patience); err != nil {
			return nil, err
		}
		// Each round begins with another contestant, so that nobody always follows the same one.
		first := round % len(chosen)
		inTurn := slices.Concat(chosen[first:], chosen[:first])
		used, err := othersDuring(func() error {
			for _, w := range o.workloads() {
				say(w.name)
				for _, c := range inTurn {
					if isQuota(w.name) != c.quota {
						continue
					}
					if err := b.measure(ctx, c, w, o.duration, r); err != nil {
						return fmt.Errorf("%s, %s: %w", c.name, w.name, err)
					}
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
		r.others = append(r.others, used)
	}
	fmt.Fprint(os.Stderr, "\r\033[K")
	return r, nil
}

// measure runs w on a fresh process of c, once.
func (b *testbed) measure(ctx context.Context, c contestant, w workload, d time.Duration, r *report) error {
	t, err := b.start(c)
	if err != nil {
		return err
	}
	if isQuota(w.name) && b.fullRate == 0 {
		var full figures
		full, err = t.run(ctx, workload{name: "full rate", conns: 32, open: small.open}, d)
		b.fullRate = full[perSecond]
	}
	var measured figures
	if err == nil {
		measured, err = t.run(ctx, w, d)
	}
	if err := t.stop(err); err != nil {
		return err
	}
	r.add(w.name, c.name, measured)
	r.add(processWork.name, c.name, t.idle)
	return nil
}
