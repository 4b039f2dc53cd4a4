// Demo runs the proxy on a tailnet that lives on this machine alone: a control
// server, a tailscaled beside the proxy and one on a second node, the "laptop",
// and a fake Anthropic API. It prints what to type.
//
//	go -C e2e run ./demo          runs until Ctrl-C
//	go -C e2e run ./demo -once    runs the printed commands itself and ends
//
// It needs Go and curl, no account, no key and no network. The first run builds
// tailscale, which takes some minutes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	log.SetOutput(io.Discard) // the test control server and the STUN server talk there
	switch err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); {
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// errUsage is a bad command line, which the flag package has already reported.
var errUsage = errors.New("bad usage")

const usage = `Runs the proxy on a tailnet of its own on this machine, with a fake Anthropic API,
and prints what to type. Ctrl-C ends and removes everything.

usage: go -C e2e run ./demo [-once]
`

// run is the demo's life. The end of ctx is its ordinary end.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (err error) {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	once := flags.Bool("once", false, "run the printed commands, show what they print, and end")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return nil
	case err != nil:
		return errUsage
	case flags.NArg() > 0:
		flags.Usage()
		return errUsage
	}

	s, err := start(ctx, stderr)
	defer func() { err = errors.Join(err, s.close()) }()
	if ctx.Err() != nil {
		return nil // Ctrl-C while it was starting
	}
	if err != nil {
		return err
	}
	if *once {
		return s.runCommands(ctx, stdout)
	}
	s.introduce(stdout)
	return s.follow(ctx, stdout)
}
