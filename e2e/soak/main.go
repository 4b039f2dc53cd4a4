// Soak runs the released proxy for long under mixed traffic in which both sides do wrong at random, and checks every byte, every
// count and that nothing grows.
//
//	go -C e2e run ./soak              half an hour
//	go -C e2e run ./soak -for 60s     a minute
//	go -C e2e run ./soak -race        with the race detector
//	go -C e2e run ./soak -seed N      the requests of an earlier run
//
// Two proxies run at once, one before an HTTP/2 and one before an HTTP/1.1 upstream. What each request is, and what goes wrong with
// it, follows from the seed and the request's number, which stands in its path: client and upstream each know it, and each byte of
// the bodies. At the end, the proxy's log has to have exactly one line for each request, in which it ends as its plan allows, as the
// client saw it, and after as many attempts as the upstream saw; and the metrics have to be what these lines add up to. Memory,
// goroutines and descriptors are sampled, and a line is fitted through the samples. SIGTERM comes with streams in flight.
//
// It fails with a list of all that is wrong. This process keeps the log and the results, about 3 KB for a request.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

func main() {
	o, err := parseFlags(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	duration time.Duration
	seed     uint64
	clients  int
	race     bool
	binary   string // of the proxy; made if there is none
}

func parseFlags(args []string) (o options, err error) {
	flags := flag.NewFlagSet("soak", flag.ExitOnError)
	flags.DurationVar(&o.duration, "for", 30*time.Minute, "length of the traffic, 10s at least")
	flags.Uint64Var(&o.seed, "seed", 0, "`number` that the requests follow from (default random; a run tells its own)")
	flags.IntVar(&o.clients, "clients", 32, "clients at once, half of them for each proxy")
	flags.BoolVar(&o.race, "race", false, "build the proxy with the race detector, as E2E_RACE=1 does")
	flags.StringVar(&o.binary, "binary", "", "run this `build` of the proxy instead of making one")
	_ = flags.Parse(args) // it exits
	if o.seed == 0 {
		o.seed = rand.Uint64()
	}
	switch {
	case flags.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q; -h lists what there is", flags.Arg(0))
	case o.duration < 10*time.Second:
		return o, errors.New("-for must be 10s at least, or there are too few samples for a line")
	case o.clients < 2 || o.clients > 1000:
		return o, errors.New("-clients must be from 2 to 1000")
	case o.race && o.binary != "":
		return o, errors.New("-race is for a build of its own, not for that of -binary")
	}
	o.race = o.race || o.binary == "" && proxytest.Raced()
	return o, nil
}

// build makes the proxy, unless there is one.
func (o options) build() (binary string, err error) {
	switch {
	case o.binary != "":
		return filepath.Abs(o.binary) // the proxy runs in another folder
	case o.race:
		return proxytest.BuildRaced()
	}
	return proxytest.Build()
}

// run is the soak's life.
func run(ctx context.Context, o options) (err error) {
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	binary, err := o.build()
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "soak: %v of traffic, seed %d\n", o.duration, o.seed)
	stalls := &pulse{}
	watching, end := context.WithCancel(ctx)
	defer end()
	var watcher sync.WaitGroup
	watcher.Go(func() { stalls.watch(watching) })
	lanes := []*lane{{name: "HTTP/2", protocol: fakeanthropic.HTTP2, options: o}, {name: "HTTP/1.1", protocol: fakeanthropic.HTTP1, options: o}}
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range lanes {
		group.Go(func() error { return l.run(ctx, binary, stalls) })
	}
	if err := group.Wait(); err != nil {
		return err
	}
	end()
	watcher.Wait()
	return report(o, lanes, len(stalls.stalls))
}

// problems collects what went wrong in a lane.
type problems struct {
	mu   sync.Mutex
	list []string
}

func (p *problems) add(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.list = append(p.list, fmt.Sprintf(format, args...))
}

func (p *problems) all() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.list)
}

// problemsTold is how many problems of a lane are told: of a thousand, the first tell what is wrong.
const problemsTold = 20

// report tells what happened, and returns an error if anything was wrong.
func report(o options, lanes []*lane, stalls int) error {
	again := fmt.Sprintf("-for %v -seed %d -clients %d -race=%v -binary=%s", o.duration, o.seed, o.clients, o.race, o.binary)
	fmt.Printf("soak %s\n%d processors, %s; the machine stood still %d times\n", again, runtime.NumCPU(), runtime.Version(), stalls)
	wrong := 0
	for _, l := range lanes {
		table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
		l.tell(func(name string, value any) { fmt.Fprintf(table, "%s\t%v\n", name, value) })
		if err := table.Flush(); err != nil {
			return err
		}
		all := l.problems.all()
		wrong += len(all)
		for i, problem := range all {
			if i == problemsTold {
				fmt.Printf("WRONG: %d more\n", len(all)-i)
				break
			}
			fmt.Printf("WRONG: %s\n", problem)
		}
	}
	if wrong > 0 {
		return fmt.Errorf("%d things are wrong; the same requests again: go -C e2e run ./soak %s", wrong, again)
	}
	fmt.Println("\nNot one byte was wrong, all counts add up, and nothing grows of what was seen for long enough.")
	return nil
}

// tell tells what happened in the lane: how the requests of each kind and with each fault ended, and the figures.
func (l *lane) tell(row func(name string, value any)) {
	ended := map[int]string{}
	for _, line := range l.lines {
		ended[line.number] = strings.TrimSpace(fmt.Sprint(line.Status, " ", line.code))
	}
	outcomes, verified := map[string]map[string]int{}, int64(0)
	for _, r := range l.results {
		p := newPlan(l.options.seed, r.number)
		for _, name := range []string{"kind: " + p.kind, "fault: " + string(p.fault)} {
			if outcomes[name] == nil {
				outcomes[name] = map[string]int{}
			}
			outcomes[name][cmp.Or(ended[r.number], "not logged")]++
		}
		verified += r.bytes
	}
	row("\n"+l.name, "ended as")
	for _, name := range slices.Backward(slices.Sorted(maps.Keys(outcomes))) {
		row(name, strings.TrimPrefix(fmt.Sprint(outcomes[name]), "map"))
	}
	row("requests in log and metrics", len(l.lines))
	row("of these in flight at SIGTERM", l.atEnd)
	row("late, on a machine too busy", l.late)
	row("MiB of requests verified", l.upstream.verified.Load()/mib)
	row("MiB of answers verified", verified/mib)
	for i, q := range quantities {
		most, trend := 0.0, "too short a run to tell a trend"
		for _, s := range l.samples {
			most = max(most, s.values[i])
		}
		if t, ok := fitTrend(i, l.samples, l.options.duration); ok {
			trend = t.String()
		}
		row(q.name, fmt.Sprintf("%.1f at most, %s", most, trend))
	}
	row("RSS at its peak, MiB", fmt.Sprintf("%.1f", l.peak))
}

const (
	// beat is the time between two looks at the clock.
	beat = 50 * time.Millisecond
	// stallLength is how late a look has to be to count: timeouts here are of a second or two, and other processes stand still longer
	// than this one at times.
	stallLength = 200 * time.Millisecond
	// stallMargin widens a request's time: a connection that is lost went silent before, and the proxy may notice a client's departure
	// later.
	stallMargin = 3 * time.Second
)

// A pulse finds out when this process got no processor, and so when the others on this machine hardly did.
type pulse struct {
	mu     sync.Mutex
	stalls []stall
}

type stall struct{ from, to time.Time }

// watch looks at the clock until ctx ends.
func (p *pulse) watch(ctx context.Context) {
	for ctx.Err() == nil {
		from := time.Now()
		time.Sleep(beat)
		if to := time.Now(); to.Sub(from) >= beat+stallLength {
			p.mu.Lock()
			p.stalls = append(p.stalls, stall{from, to})
			p.mu.Unlock()
		}
	}
}

// stalled reports whether there was a stall at about that time.
func (p *pulse) stalled(from, to time.Time) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.stalls, func(s stall) bool {
		return s.from.Before(to.Add(stallMargin)) && s.to.After(from.Add(-stallMargin))
	})
}
