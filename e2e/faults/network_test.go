//go:build faults

package faults

import (
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// pinged is a configuration by which dead connections are found in 4 s, half of timeout_secs. The defaults have 30 s for that.
const pinged = "[proxy]\ntimeout_secs = 8\n"

// protocolFaults are those of what lies between the proxy and its upstream that happen over either protocol; outcomes have a
// place for the probes.
var protocolFaults = []fault{
	{name: "the connection dies without a FIN under a stream", over: (*scene).deadUnderStream,
		outcome: "the stream breaks off within `timeout_secs`, as soon as %s tell; `response_read`"},
	{name: "the connection dies without a FIN before the headers", over: (*scene).deadBeforeHeaders,
		outcome: "502 `connection` as soon as %s tell, however patient the client is; not sent again"},
	{name: "all idle connections die without a FIN", over: func(s *scene, via way) { s.deadPool(via, "[proxy]\ntimeout_secs = 24\n", 0, isRefused(via.dead)) },
		outcome: "502 `connection` for requests that they get before %s tell, as these may have been processed; then all is well"},
	{name: "all idle connections die without a FIN, a while before they are needed", outcome: "nobody notices: %s have told",
		over: func(s *scene, via way) { s.deadPool(via, pinged, 8*time.Second, isPassed(200, "2")) }},
	{name: "one packet in 20 is lost", outcome: "slow, and nothing else: all answers and streams are whole", over: (*scene).lossy},
}

// A way is how the proxy speaks to the upstream.
type way struct {
	protocol fakeanthropic.Protocol
	name     string
	probes   string // what finds a dead connection
	dead     string // what the log then says
	conns    int    // that five requests at once take
}

// overEither returns each of the faults over one protocol and over the other.
func overEither(faults []fault) (both []fault) {
	for _, f := range faults {
		for _, via := range []way{
			{fakeanthropic.HTTP1, "HTTP/1.1", "keep-alive probes", "connection timed out", 5},
			{fakeanthropic.HTTP2, "HTTP/2", "pings", "connection lost", 1},
		} {
			both = append(both, fault{
				name:    f.name + ", over " + via.name,
				outcome: strings.Replace(f.outcome, "%s", via.probes, 1),
				run:     func(s *scene) { f.over(s, via) },
			})
		}
	}
	return both
}

// networkFaults are those for which the protocol makes no difference.
var networkFaults = []fault{
	{name: "large packets vanish, as in a tunnel with a small MTU",
		outcome: "502 `connection` when the upstream has acknowledged nothing for as long as pings take; not sent again",
		run:     largePacketsVanish},
	{name: "no route to the upstream", outcome: "502 `connection` after one repetition", run: outOfReach(
		func(w *wire) { w.near.ip("route add unreachable " + farAddr) },
		func(w *wire) { w.near.ip("route del unreachable " + farAddr) }, 2, "no route to host", 0)},
	{name: "a router says that the upstream can't be reached", outcome: "502 `connection` after one repetition", run: outOfReach(
		func(w *wire) {
			w.far.nft(`table inet faults {
	chain entering {
		type filter hook input priority filter;
		meta l4proto tcp reject with icmp type host-unreachable
	}
}
`)
		}, (*wire).heal, 2, "no route to host", 0)},
	{name: "the upstream's address is a black hole", outcome: "502 `connection` after `connect_timeout_secs`, tried once",
		run: outOfReach((*wire).cut, (*wire).heal, 1, "i/o timeout", 5*time.Second)},
	{name: "DNS fails with SERVFAIL, and heals", outcome: "502 `connection` after one repetition, as long as it fails; then all is well",
		run: nameless(dns.RcodeServerFailure, 2, "server misbehaving", 0)},
	{name: "DNS does not know the name, and learns it", outcome: "502 `connection` after one repetition, as long as it does not; then all is well",
		run: nameless(dns.RcodeNameError, 2, "no such host", 0)},
	{name: "DNS says nothing, and heals", outcome: "502 `connection` after `connect_timeout_secs`, tried once, as long as it says nothing; then all is well",
		run: nameless(silentDNS, 1, "i/o timeout", 5*time.Second)},
	{name: "the first query for each name is lost, with the resolver's options of `k8s/`", outcome: "served, two seconds late (without them: 502)", run: func(s *scene) {
		w := newWire(s)
		up := w.api(fakeanthropic.HTTP2, count)
		names := w.nameserver()
		names.loses = true
		w.start(names.use("options ndots:1 timeout:2 attempts:3"), "https://upstream.test", "", append(up.Env(), pureGo)...)
		began := time.Now()
		s.Passed(s.Post(), 200, posted, 1)
		s.within("answered", time.Since(began), 2*time.Second, 5*time.Second)
		s.got(up, 1)
	}},
}

// got checks how many requests have reached the upstream.
func (s *scene) got(up *fakeanthropic.Server, want int) {
	s.Helper()
	if got := len(up.Requests()); got != want {
		s.Errorf("the upstream got %d requests, want %d", got, want)
	}
}

// stream sends a request and reads the first event of its answer. The whole of it comes later.
func (s *scene) stream() <-chan proxytest.Answer {
	s.Helper()
	resp := proxytest.Must(s.Client.Post(s.Proxy.URL()+"/v1/messages", "application/json", strings.NewReader("{}")))(s.T)
	first := make([]byte, len(proxytest.Event))
	proxytest.Must(io.ReadFull(resp.Body, first))(s.T)
	answers := make(chan proxytest.Answer, 1)
	go func() {
		defer resp.Body.Close()
		rest, err := io.ReadAll(resp.Body)
		answers <- proxytest.Answer{Response: resp, Text: string(first) + string(rest), Err: err}
	}()
	return answers
}

// patiently sends a request with this body whose client says that it waits for 600 s; its answer comes later.
func (s *scene) patiently(body string) <-chan proxytest.Answer {
	return s.InBackground(strings.NewReader(body), "X-Stainless-Timeout", "600")
}

// sendEvent sends an proxytest.Event, if its reader is still there.
func sendEvent(w http.ResponseWriter) {
	io.WriteString(w, proxytest.Event)
	http.NewResponseController(w).Flush()
}

// within checks how long something took.
func (s *scene) within(what string, took, least, most time.Duration) {
	s.Helper()
	s.Logf("%s after %v", what, took.Round(time.Millisecond))
	if took < least || took > most {
		s.Errorf("%s after %v, want %v to %v", what, took, least, most)
	}
}

func (s *scene) deadUnderStream(via way) {
	w := newWire(s)
	up := w.api(via.protocol, func(w http.ResponseWriter, r *http.Request) {
		sendEvent(w)
		<-r.Context().Done()
	})
	w.start("", up.URL, pinged, up.Env()...)
	pending := s.stream()
	began := time.Now()
	w.cut()
	s.Broken(<-pending, proxytest.Event, via.dead)
	s.within("broken off", time.Since(began), 2*time.Second, 8*time.Second)
	w.heal()
	s.got(up, 1)
}

func (s *scene) deadBeforeHeaders(via way) {
	w := newWire(s)
	arrived := make(chan struct{})
	up := w.api(via.protocol, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		close(arrived)
		<-r.Context().Done()
	})
	w.start("", up.URL, hasty, up.Env()...)
	pending := s.patiently("{}")
	<-arrived
	began := time.Now()
	w.cut()
	s.Refused(<-pending, 502, "connection", 1, via.dead)
	s.within("given up", time.Since(began), time.Second, 10*time.Second)
	w.heal()
	s.got(up, 1)
}

// deadPool fills the proxy's pool of idle connections, lets all of them die and sends requests after a while, which get what
// check wants. New connections work all the time.
func (s *scene) deadPool(via way, config string, while time.Duration, check want) {
	const requests = 5
	w := newWire(s)
	var together sync.WaitGroup
	together.Add(requests)
	var sent atomic.Int32
	up := w.api(via.protocol, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		if n := sent.Add(1); 1 < n && n <= 1+requests { // each needs a connection, or a stream, of its own
			together.Done()
			together.Wait()
		}
		fmt.Fprint(w, n)
	})
	w.start("", up.URL, config, up.Env()...)
	served := 1
	round := func(check want) {
		s.crowd(requests, 1, func() proxytest.Answer { return s.Send("POST", "/v1/messages", strings.NewReader("{}")) },
			func(s *scene, a proxytest.Answer) {
				check(s, a)
				if a.StatusCode == http.StatusOK {
					served++
				}
			})
	}
	s.Passed(s.Post(), 200, posted, 1) // before others: one connection is enough for them over HTTP/2
	round(isPassed(200, "2"))
	if got := len(up.ClientPorts()); got != via.conns {
		s.Fatalf("the proxy has %d connections, want %d", got, via.conns)
	}
	time.Sleep(time.Second) // the answers are here before the last connection is back in the pool
	w.forget(up)
	time.Sleep(while)
	round(check)
	w.someLost()
	round(isPassed(200, "2"))
	w.heal()
	s.got(up, served)
}

func (s *scene) lossy(via way) {
	const clients, each, events = 8, 6, 20
	large := rand.Text() + strings.Repeat("x", 64<<10)
	w := newWire(s)
	up := w.api(via.protocol, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		switch {
		case err != nil:
			panic(http.ErrAbortHandler)
		case string(body) != "stream":
			w.Write(body)
			return
		}
		for range events {
			sendEvent(w)
			time.Sleep(5 * time.Millisecond)
		}
	})
	w.start("", up.URL, "[proxy]\nconnect_timeout_secs = 60\n", up.Env()...) // three losses in a row take 7 s
	w.lose("numgen random mod 100 < 5")
	began := time.Now()
	var sent atomic.Int32
	s.crowd(clients, each, func() proxytest.Answer {
		if sent.Add(1)%2 == 0 {
			return s.Send("POST", "/v1/messages", strings.NewReader("stream"))
		}
		return s.Send("POST", "/v1/messages", strings.NewReader(large))
	}, func(s *scene, a proxytest.Answer) {
		if strings.HasPrefix(a.Text, proxytest.Event) {
			s.Passed(a, 200, strings.Repeat(proxytest.Event, events), 1)
		} else {
			s.Passed(a, 200, large, 1)
		}
	})
	s.Logf("%d requests in %v", clients*each, time.Since(began).Round(time.Millisecond))
	w.someLost()
	s.got(up, clients*each)
	w.heal()
}

func largePacketsVanish(s *scene) {
	w := newWire(s)
	up := w.api(fakeanthropic.HTTP2, count)
	w.start("", up.URL, pinged, up.Env()...)
	s.Passed(s.Post(), 200, posted, 1)
	w.lose("meta length > 1000")
	s.Passed(s.Post(), 200, posted, 1)
	began := time.Now()
	s.Refused(s.Send("POST", "/v1/messages", zeros(64<<10)), 502, "connection", 1, "connection:")
	s.within("given up", time.Since(began), 2*time.Second, 8*time.Second)
	w.someLost()
	w.heal()
}

// outOfReach has connections to the upstream fail with err, after a while at least, and then no more.
func outOfReach(harm, heal func(*wire), attempts int, err string, while time.Duration) func(*scene) {
	return func(s *scene) {
		w := newWire(s)
		up := w.api(fakeanthropic.HTTP2, count)
		w.start("", up.URL, "", up.Env()...)
		harm(w)
		s.givenUp(attempts, err, while)
		s.got(up, 0)
		heal(w)
		s.Passed(s.Post(), 200, posted, 1)
		s.got(up, 1)
	}
}

// nameless has the upstream's name lookup fail with err, after a while at least, and then no more.
func nameless(failure int, attempts int, err string, while time.Duration) func(*scene) {
	return func(s *scene) {
		w := newWire(s)
		up := w.api(fakeanthropic.HTTP2, count)
		names := w.nameserver()
		names.answer(failure)
		w.start(names.use(), "https://upstream.test", "", append(up.Env(), pureGo)...)
		s.givenUp(attempts, err, while)
		if names.asked.Load() == 0 {
			s.Error("nobody has asked the name server")
		}
		s.got(up, 0)
		names.answer(dns.RcodeSuccess)
		s.Passed(s.Post(), 200, posted, 1)
		names.answer(failure)
		s.Passed(s.Post(), 200, posted, 1) // over the connection that there is
		s.got(up, 2)
		names.answer(dns.RcodeSuccess)
	}
}

// givenUp sends a request that fails with err, after a while at least.
func (s *scene) givenUp(attempts int, err string, while time.Duration) {
	s.Helper()
	began := time.Now()
	s.Refused(s.Post(), 502, "connection", attempts, err)
	if while > 0 { // otherwise it is the machine that takes its time
		s.within("given up", time.Since(began), while, while+5*time.Second)
	}
}
