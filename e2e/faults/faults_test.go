//go:build faults

// Package faults produces the proxy's worst days on purpose: what an upstream, a client, a network or a machine can do to it,
// each as a named case with the outcome on all sides. It needs root, since parts of it make network namespaces and control
// groups:
//
//	go -C e2e test -tags faults -count=1 -parallel 8 ./faults
//
// The table of faults in RUNBOOK.md is made from the cases, by adding -update.
package faults

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"anthropic-oauth-proxy/e2e/proxytest"
)

var update = flag.Bool("update", false, "write the table of faults to RUNBOOK.md")

// A fault is one way to harm the proxy.
type fault struct {
	name    string // what goes wrong
	outcome string // what everyone gets, for RUNBOOK.md
	release bool   // the proxy is built as it is released, since size, memory or time is the subject; else with the race detector
	alone   bool   // no other fault beside it
	run     func(s *scene)
	over    func(s *scene, via way) // instead of run, for those of [protocolFaults]
}

// A scene is where one fault happens.
type scene struct {
	*proxytest.Scene
	fault fault
}

// hasty is a configuration that makes waits short, but not too short for what is to succeed: on a busy machine anything may take a
// second or two.
const hasty = "[proxy]\ntimeout_secs = 4\n"

// onePlace is a configuration of one request at a time.
const onePlace = "[proxy]\nmax_connections = 1\n"

// groups are all faults, by whose they are.
var groups = []struct {
	name   string
	faults []fault
}{
	{"Upstream", upstreamFaults},
	{"Upstream over HTTP/2", http2Faults},
	{"Upstream's certificate", tlsFaults},
	{"Client", clientFaults},
	{"Network", append(overEither(protocolFaults), networkFaults...)},
	{"Resources", resourceFaults},
	{"Clock", clockFaults},
	{"Life cycle", lifeCycleFaults},
	{"Configuration", limitFaults},
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(proxytest.Main(m))
}

// TestFaults does all the harm.
func TestFaults(t *testing.T) {
	for _, group := range groups {
		t.Run(group.name, func(t *testing.T) {
			for _, f := range group.faults {
				t.Run(f.name, func(t *testing.T) {
					if !f.alone {
						t.Parallel()
					}
					s := &scene{proxytest.NewScene(t), f}
					s.Raced = !f.release
					f.run(s)
				})
			}
		})
	}
}

// crowd has clients send so many requests each, whose answers are to be as wanted, and returns how long each took.
func (s *scene) crowd(clients, each int, send func() proxytest.Answer, want want) (took []time.Duration) {
	s.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	for range clients {
		all.Go(func() {
			for range each {
				began := time.Now()
				a := send()
				mu.Lock()
				took = append(took, time.Since(began))
				want(s, a)
				mu.Unlock()
			}
		})
	}
	all.Wait()
	return took
}

// TestRunbook shows that the runbook lists the faults as they are.
func TestRunbook(t *testing.T) {
	const path, begin, end = "../../RUNBOOK.md", "<!-- faults: made by e2e/faults -->\n", "<!-- end of faults -->\n"
	runbook := proxytest.Must(os.ReadFile(path))(t)
	before, rest, ok := strings.Cut(string(runbook), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the faults, between %q and %q", path, begin, end)
	}
	var table strings.Builder
	for _, group := range groups {
		fmt.Fprintf(&table, "\n| %s | outcome |\n|---|---|\n", group.name)
		for _, f := range group.faults {
			fmt.Fprintf(&table, "| %s | %s |\n", f.name, f.outcome)
		}
	}
	want := before + begin + table.String() + "\n" + end + after
	switch {
	case want == string(runbook):
	case *update:
		proxytest.Check(t, os.WriteFile(path, []byte(want), 0o644))
	default:
		t.Errorf("the faults in %s are not those of this package: run go -C e2e test -tags faults -run TestRunbook ./faults -update", path)
	}
}
