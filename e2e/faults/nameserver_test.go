//go:build faults

package faults

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/miekg/dns"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// silentDNS is no answer at all.
const silentDNS = -1

// pureGo has Go's own resolver used, as in the released build, where there is no other.
const pureGo = "GODEBUG=netdns=go"

// A nameserver answers DNS queries at the far end of a wire. It knows every name, at farAddr, as long as it is to answer with success.
type nameserver struct {
	s     *scene
	rcode atomic.Int32
	asked atomic.Int32 // queries so far
	known sync.Map     // questions that were asked before
	loses bool         // the first query of each kind for each name; to be set before there is one
}

// nameserver runs a nameserver.
func (w *wire) nameserver() *nameserver {
	var conn net.PacketConn
	var err error
	w.far.do(func() { conn, err = net.ListenPacket("udp", farAddr+":53") })
	proxytest.Check(w.s.T, err)
	w.s.Cleanup(func() { conn.Close() })
	n := &nameserver{s: w.s}
	go (&dns.Server{PacketConn: conn, Handler: n}).ActivateAndServe() // until it is closed
	return n
}

// use is a line of shell: what follows it asks this nameserver only, with these
// lines more in its configuration. It is for a process with mounts of its own.
func (n *nameserver) use(more ...string) string {
	text := strings.Join(append(more, "nameserver "+farAddr), "\n") + "\n"
	return fmt.Sprintf("mount --bind '%s' /etc/resolv.conf", n.s.File("resolv.conf", text))
}

// answer has queries answered with this code.
func (n *nameserver) answer(rcode int) { n.rcode.Store(int32(rcode)) }

// ServeDNS answers a query.
func (n *nameserver) ServeDNS(w dns.ResponseWriter, query *dns.Msg) {
	n.asked.Add(1)
	q, rcode := query.Question[0], int(n.rcode.Load())
	if _, known := n.known.LoadOrStore(q, true); n.loses && !known || rcode == silentDNS {
		return
	}
	reply := new(dns.Msg).SetRcode(query, rcode)
	if rcode == dns.RcodeSuccess && q.Qtype == dns.TypeA {
		reply.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(farAddr)}}
	}
	w.WriteMsg(reply)
}
