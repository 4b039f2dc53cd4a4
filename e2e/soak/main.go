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
	"io"
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
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "soak:", err)
		os.Exit(1)
	}
}

// errUsage is a bad command line, which the flag package has already reported.
var errUsage = errors.New("bad usage")

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

func parseFlags(args []string, stderr io.Writer) (options, error) {
	o := options{duration: 30 * time.Minute, seed: rand.Uint64(), clients: 32}
	flags := flag.NewFlagSet("soak", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.DurationVar(&o.duration, "for", o.duration, "length of the traffic, 10s at least")
	flags.Func("seed", "`number` that the requests follow from (default random; a run tells its own)", func(s string) error {
		_, err := fmt.Sscan(s, &o.seed)
		return err
	})
	flags.IntVar(&o.clients, "clients", o.clients, "clients at once, half of them for each proxy")
	flags.BoolVar(&o.race, "race", false, "build the proxy with the race detector, as E2E_RACE=1 does")
	flags.StringVar(&o.binary, "binary", "", "run this `build` of the proxy instead of making one")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return o, err
	case err != nil:
		return o, errUsage
	}
	if err := o.validate(flags.Args()); err != nil {
		fmt.Fprintln(stderr, "soak:", err)
		return o, errUsage
	}
	o.race = o.race || o.binary == "" && proxytest.Raced()
	return o, nil
}

func (o options) validate(rest []string) error {
	switch {
	case len(rest) > 0:
		return fmt.Errorf("unexpected argument %q; -h lists what there is", rest[0])
	case o.duration < shortest:
		return fmt.Errorf("-for must be %v at least", shortest)
	case o.clients < 2 || o.clients > 1000:
		return errors.New("-clients must be from 2 to 1000")
	case o.race && o.binary != "":
		return errors.New("-race is for a build of its own, not for that of -binary")
	}
	return nil
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
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	o, err := parseFlags(args, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, proxytest.Cleanup()) }()
	binary, err := o.build()
	if err != nil {
		return err
	}
	stalls := &pulse{}
	lanes := newLanes(o, binary, stalls)
	defer func() {
		for _, l := range lanes {
			err = errors.Join(err, l.close())
		}
	}()
	for _, l := range lanes {
		if err := l.start(); err != nil {
			return err
		}
	}
	fmt.Fprintf(stderr, "soak: %v of traffic, seed %d\n", o.duration, o.seed)
	soak(ctx, o, lanes, stalls, stderr)
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	for _, l := range lanes {
		l.verify()
	}
	return report(stdout, o, lanes)
}

// progressEvery is the time between two lines that tell how it goes on.
const progressEvery = 10 * time.Second

// soak has the lanes' clients send requests for as long as o says.
func soak(ctx context.Context, o options, lanes []*lane, stalls *pulse, progress io.Writer) {
	begun := time.Now()
	sending, stop := context.WithTimeout(ctx, o.duration)
	defer stop()
	watching, end := context.WithCancel(ctx) // until the last request is finished
	var clients, watchers sync.WaitGroup
	watchers.Go(func() { stalls.watch(watching) })
	watchers.Go(func() { tell(watching, o, lanes, begun, progress) })
	for _, l := range lanes {
		clients.Go(func() { l.traffic(sending, begun) })
	}
	clients.Wait()
	end()
	watchers.Wait()
}

// tell writes now and then how it goes on, until ctx ends.
func tell(ctx context.Context, o options, lanes []*lane, begun time.Time, progress io.Writer) {
	ticker := time.NewTicker(progressEvery)
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
		fmt.Fprintf(progress, "soak: %v of %v; %s; %d wrong\n",
			time.Since(begun).Round(time.Second), o.duration, strings.Join(states, "; "), wrong)
	}
}
