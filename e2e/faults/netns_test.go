//go:build faults

package faults

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// A namespace is a network of its own. A thread lives there: what it opens is there too. The kernel takes the namespace away,
// with all that is in it, when the thread, and the processes and sockets in it, are gone, however this program ends.
type namespace struct {
	s    *scene
	tid  int
	work chan func()
	left chan struct{} // closed when the thread may go
}

func newNamespace(s *scene) *namespace {
	n := &namespace{s: s, work: make(chan func()), left: make(chan struct{})}
	entered := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		n.tid = syscall.Gettid()
		entered <- syscall.Unshare(syscall.CLONE_NEWNET)
		for {
			select {
			case f := <-n.work:
				f()
			case <-n.left:
				return
			}
		}
	}()
	s.Cleanup(func() { close(n.left) })
	proxytest.Check(s.T, <-entered) // it takes root
	return n
}

// do runs f on the namespace's thread, if it is still there. f must not end the test.
func (n *namespace) do(f func()) {
	done := make(chan struct{})
	select {
	case n.work <- func() { defer close(done); f() }:
		<-done
	case <-n.left:
	}
}

// ip runs these commands of ip(8), one a line.
func (n *namespace) ip(commands string) { n.run(commands, "ip", "-batch", "-") }

// nft runs these commands of nft(8), and returns what they print.
func (n *namespace) nft(commands string) string { return n.run(commands, "nft", "-f", "-") }

func (n *namespace) run(input, program string, args ...string) string {
	cmd := exec.Command(program, args...)
	cmd.Stdin = strings.NewReader(input)
	var out []byte
	var err error
	n.do(func() { out, err = cmd.CombinedOutput() })
	if err != nil {
		n.s.Fatalf("%s: %v\n%s\nof: %s", program, err, out, input)
	}
	return string(out)
}

// door lets clients in that are outside: a port of 127.0.0.1 that leads to the same port inside, which it returns.
func (n *namespace) door() (port string) {
	outside := proxytest.Must(net.Listen("tcp", "127.0.0.1:0"))(n.s.T)
	n.s.Cleanup(func() { outside.Close() })
	go func() {
		for {
			client, err := outside.Accept()
			if err != nil {
				return // closed
			}
			var conn net.Conn
			n.do(func() { conn, err = net.Dial("tcp", outside.Addr().String()) })
			if conn == nil || err != nil {
				client.Close()
				continue
			}
			go pass(client, conn)
			go pass(conn, client)
		}
	}()
	_, port, _ = net.SplitHostPort(outside.Addr().String())
	return port
}

// pass hands on what comes from one connection to the other, and its end.
func pass(from, to net.Conn) {
	if _, err := io.Copy(to, from); err != nil {
		from.Close()
		to.Close()
		return
	}
	to.(*net.TCPConn).CloseWrite()
}

// farAddr is where the far end of a wire is.
const farAddr = "192.0.2.2"

// A wire joins the proxy at its near end to an upstream at its far end, each in a namespace of its own.
type wire struct {
	s         *scene
	near, far *namespace
}

func newWire(s *scene) *wire {
	w := &wire{s: s, near: newNamespace(s), far: newNamespace(s)}
	w.near.ip(fmt.Sprintf(`link set lo up
link add wire type veth peer name wire netns %d
addr add 192.0.2.1/24 dev wire
link set wire up
`, w.far.tid))
	w.far.ip("link set lo up\naddr add " + farAddr + "/24 dev wire\nlink set wire up\n")
	return w
}

// start runs the proxy at the near end, after these lines of shell.
func (w *wire) start(lines, upstream, config string, env ...string) {
	w.s.Launch(proxytest.Options{
		Within: []string{"nsenter", fmt.Sprintf("--net=/proc/%d/task/%d/ns/net", os.Getpid(), w.near.tid), "unshare", "--mount"},
		Before: lines,
		Args:   []string{"-local", "-listen", "127.0.0.1:" + w.near.door(), "-upstream", upstream},
		Config: config,
		Env:    env,
	})
}

// lose has both ends lose the packets that arrive and match one of these, without a word to anyone.
func (w *wire) lose(matches ...string) {
	var rules strings.Builder
	for _, match := range matches {
		fmt.Fprintf(&rules, "\t\tiifname wire %s counter name lost drop\n", match)
	}
	for _, end := range []*namespace{w.near, w.far} {
		end.nft(`table inet faults {
	counter lost { }
	chain arriving {
		type filter hook prerouting priority raw;
` + rules.String() + "\t}\n}\n")
	}
}

// cut has both ends lose everything.
func (w *wire) cut() { w.s.Helper(); w.lose("") }

// forget has both ends lose the packets of the connections that up has now, as when something on the way has forgotten them.
func (w *wire) forget(up *fakeanthropic.Server) {
	ports := strings.Join(up.ClientPorts(), ", ")
	w.lose("th sport { "+ports+" }", "th dport { "+ports+" }")
}

// someLost shows that packets were lost since the last heal.
func (w *wire) someLost() {
	for _, end := range []*namespace{w.near, w.far} {
		if !strings.Contains(end.nft("list counter inet faults lost"), "packets 0 ") {
			return
		}
	}
	w.s.Error("no packet was lost")
}

// heal ends every loss.
func (w *wire) heal() {
	w.near.nft("flush ruleset")
	w.far.nft("flush ruleset")
}

// api runs a fake API at the far end.
func (w *wire) api(protocol fakeanthropic.Protocol, handler http.HandlerFunc) *fakeanthropic.Server {
	var listener net.Listener
	var err error
	w.far.do(func() { listener, err = net.Listen("tcp", farAddr+":443") })
	proxytest.Check(w.s.T, err)
	api := proxytest.Must(fakeanthropic.StartOn(listener, protocol, handler))(w.s.T)
	w.s.Use(api)
	return api
}
