//go:build faults

package faults

import (
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	"golang.org/x/net/dns/dnsmessage"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// silentDNS is no answer at all.
const silentDNS = dnsmessage.RCode(0xffff)

// pureGo has Go's own resolver used, as in the released build, where there is no other.
const pureGo = "GODEBUG=netdns=go"

// A nameserver answers DNS queries at the far end of a wire. It knows every name,
// at farAddr, as long as it is to answer with success.
type nameserver struct {
	s     *scene
	conn  net.PacketConn
	rcode atomic.Uint32
	asked atomic.Int32 // queries so far
	loses bool         // the first query of each kind for each name; to be set before there is one
}

// nameserver runs a nameserver.
func (w *wire) nameserver() *nameserver {
	n := &nameserver{s: w.s}
	var err error
	w.far.do(func() { n.conn, err = net.ListenPacket("udp", farAddr+":53") })
	proxytest.Check(w.s.T, err)
	w.s.Cleanup(func() { n.conn.Close() })
	go n.serve()
	return n
}

// use is a line of shell: what follows it asks this nameserver only, with these
// lines more in its configuration. It is for a process with mounts of its own.
func (n *nameserver) use(more ...string) string {
	text := strings.Join(append(more, "nameserver "+farAddr), "\n") + "\n"
	return fmt.Sprintf("mount --bind '%s' /etc/resolv.conf", n.s.File("resolv.conf", text))
}

// answer has queries answered with this code.
func (n *nameserver) answer(rcode dnsmessage.RCode) { n.rcode.Store(uint32(rcode)) }

func (n *nameserver) serve() {
	packet := make([]byte, 512)
	known := map[string]bool{} // questions that were asked before
	for {
		size, from, err := n.conn.ReadFrom(packet)
		if err != nil {
			return // closed
		}
		n.asked.Add(1)
		rcode := dnsmessage.RCode(n.rcode.Load())
		question := string(packet[2:size]) // without the query's number
		if lost := n.loses && !known[question]; lost || rcode == silentDNS {
			known[question] = true
			continue
		}
		reply, err := replyTo(packet[:size], rcode)
		if err != nil {
			n.s.Errorf("a query that is no query: %v", err)
			continue
		}
		n.conn.WriteTo(reply, from)
	}
}

// replyTo makes the reply to a query.
func replyTo(query []byte, rcode dnsmessage.RCode) ([]byte, error) {
	var m dnsmessage.Message
	if err := m.Unpack(query); err != nil {
		return nil, err
	}
	m.Response, m.RecursionAvailable, m.RCode, m.Additionals = true, true, rcode, nil
	for _, q := range m.Questions {
		if rcode == dnsmessage.RCodeSuccess && q.Type == dnsmessage.TypeA {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class},
				Body:   &dnsmessage.AResource{A: [4]byte(net.ParseIP(farAddr).To4())},
			})
		}
	}
	return m.Pack()
}
