// Soak runs the released proxy for long under mixed traffic in which both sides do
// wrong at random, and checks every byte, every count and that nothing grows.
//
//	go -C e2e run ./soak              half an hour
//	go -C e2e run ./soak -for 60s     a minute
//	go -C e2e run ./soak -race        with the race detector
//	go -C e2e run ./soak -seed N      the requests of an earlier run
//
// Two proxies run at once, one before an HTTP/2 and one before an HTTP/1.1 upstream.
// What each request is, and what goes wrong with it, follows from the seed and the
// request's number, which stands in its path: client and upstream each know it, and
// each byte of the bodies. At the end, the proxy's log has to have exactly one line
// for each request, in which it ends as its plan allows, as the client saw it, and
// after as many attempts as the upstream saw; and the metrics have to be what these
// lines add up to. Memory, goroutines and descriptors are sampled, and a line is
// fitted through the samples.
//
// It fails with a list of all that is wrong. This process keeps the log and the
// results, about 3 KB for a request.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

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

// shortest is the shortest run: enough samples for a line.
const shortest = 10 * time.Second

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
	case o.duration < shortest:
		return o, fmt.Errorf("-for must be %v at least", shortest)
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

// String is the command line that repeats the run's requests.
func (o options) String() string {
	s := fmt.Sprintf("go -C e2e run ./soak -for %v -seed %d -clients %d", o.duration, o.seed, o.clients)
	if o.race {
		s += " -race"
	}
	if o.binary != "" {
		s += " -binary " + o.binary
	}
	return s
}

// run is the soak's life.
func run(ctx context.Context, o options) (err error) {
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	binary, err := o.build()
	if err != nil {
		return err
	}
	lanes := []*lane{{name: "HTTP/2", options: o}, {name: "HTTP/1.1", options: o}}
	for i, l := range lanes {
		defer func() { err = errors.Join(err, l.close()) }()
		if err := l.start(binary, i == 0); err != nil {
			return err
		}
	}
	fmt.Fprintf(os.Stderr, "soak: %v of traffic, seed %d\n", o.duration, o.seed)
	stalls := &pulse{}
	soak(ctx, o, lanes, stalls)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return report(os.Stdout, o, lanes, stalls)
}

// soak has the lanes' clients send requests for as long as o says, and then looks at
// what became of them.
func soak(ctx context.Context, o options, lanes []*lane, stalls *pulse) {
	begun := time.Now()
	sending, stop := context.WithTimeout(ctx, o.duration)
	defer stop()
	watching, end := context.WithCancel(ctx)
	var traffic, watchers sync.WaitGroup
	watchers.Go(func() { stalls.watch(watching) })
	watchers.Go(func() { tell(watching, o, lanes, begun) })
	for _, l := range lanes {
		traffic.Go(func() { l.traffic(sending, begun) })
	}
	traffic.Wait()
	for _, l := range lanes {
		if ctx.Err() == nil {
			l.verify(stalls)
		}
	}
	end()
	watchers.Wait()
}

// tell writes now and then how it goes on, until ctx ends.
func tell(ctx context.Context, o options, lanes []*lane, begun time.Time) {
	ticker := time.NewTicker(10 * time.Second)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		var states []string
		wrong := 0
		for _, l := range lanes {
			states = append(states, l.state())
			_, n := l.problems.all()
			wrong += n
		}
		fmt.Fprintf(os.Stderr, "soak: %v of %v; %s; %d wrong\n",
			time.Since(begun).Round(time.Second), o.duration, strings.Join(states, "; "), wrong)
	}
}

const (
	// beat is the time between two looks at the clock.
	beat = 50 * time.Millisecond
	// stallLength is how late a look has to be to count: timeouts here are of a
	// second or two, and other processes stand still longer than this one at times.
	stallLength = 200 * time.Millisecond
	// stallMargin widens a request's time: a connection that is lost went silent
	// before, and the proxy may notice a client's departure later.
	stallMargin = 3 * time.Second
)

// A pulse finds out when this process got no processor, and so when the others on
// this machine hardly did.
type pulse struct {
	mu     sync.Mutex
	stalls []stall
}

// A stall is a time in which nothing went on.
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
	for _, s := range p.stalls {
		if s.from.Before(to.Add(stallMargin)) && s.to.After(from.Add(-stallMargin)) {
			return true
		}
	}
	return false
}

// String is for the end, after watch.
func (p *pulse) String() string {
	var longest, all time.Duration
	for _, s := range p.stalls {
		longest = max(longest, s.to.Sub(s.from))
		all += s.to.Sub(s.from)
	}
	return fmt.Sprintf("%d times, %v at most, %v in all", len(p.stalls), longest.Round(time.Millisecond), all.Round(time.Millisecond))
}
