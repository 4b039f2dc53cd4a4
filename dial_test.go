package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// faultyConn fails in the ways of real connections.
type faultyConn struct {
	net.Conn
	writeErr func() error // of the next write, if not nil
}

func (c *faultyConn) Write(p []byte) (int, error) {
	if err := c.writeErr(); err != nil {
		c.Conn.Close()
		return 0, err
	}
	return c.Conn.Write(p)
}

// TestEarlyAnswerConn: the error of a write is kept back only while an answer may still stand in the socket.
func TestEarlyAnswerConn(t *testing.T) {
	for name, row := range map[string]struct {
		sent     bool // something was written before
		answers  bool // and something read after it
		gathered bool
		err      error
		kept     bool
	}{
		"first write":                                {err: syscall.EPIPE},
		"in the middle of a request: closed":         {sent: true, err: syscall.EPIPE, kept: true},
		"in the middle of a request: reset":          {sent: true, err: syscall.ECONNRESET, kept: true},
		"in the middle of a request: something else": {sent: true, err: os.ErrDeadlineExceeded},
		"after the answer":                           {sent: true, answers: true, err: syscall.EPIPE},
		"gathered: an answer to others may be there": {gathered: true, err: syscall.EPIPE, kept: true},
		"gathered: something else":                   {gathered: true, err: os.ErrDeadlineExceeded},
	} {
		here, there := net.Pipe()
		var failing error
		conn := &upstreamConn{Conn: &faultyConn{here, func() error { return failing }}}
		if row.sent {
			go io.CopyN(io.Discard, there, 1)
			conn.Write([]byte("x"))
		}
		if row.answers {
			go there.Write([]byte("y"))
			conn.Read(make([]byte, 1))
		}
		failing = os.NewSyscallError("write", row.err)
		if row.gathered {
			conn.gather()
		}
		n, err := conn.Write([]byte("zz"))
		if row.gathered {
			conn.gathered.flush(time.Minute)
			_, err = conn.gathered.state()
		}
		if row.kept {
			equal(t, name, err, nil)
			equal(t, name+": written", n, 2)
		} else {
			holds(t, errors.Is(err, row.err), "%s: %d, %v", name, n, err)
		}
	}
}

// TestDialTLSTimeout: connect_timeout_secs also ends a handshake with a peer that accepts and says nothing.
func TestDialTLSTimeout(t *testing.T) {
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	u := newUpstream(testConfig(t, "proxy.upstream_url = \"https://"+l.Addr().String()+"\"", overrides{}))
	u.pool.timeout = 50 * time.Millisecond
	_, err := u.pool.reserve(t.Context())
	dial, ok := errors.AsType[*dialError](err)
	holds(t, ok && dial.Timeout(), "the error is %v, want a timeout", err)
}

// gathering returns a connection that gathers, and its peer, in memory.
func gathering(t *testing.T) (*upstreamConn, net.Conn) {
	here, there := net.Pipe()
	t.Cleanup(func() { here.Close(); there.Close() })
	conn := newUpstreamConn(context.Background(), here, time.Minute)
	conn.gather()
	return conn, there
}

// TestGatheredWrites: what was written comes in order and whole, in pieces of any size, large ones among them, which are not gathered.
func TestGatheredWrites(t *testing.T) {
	conn, there := gathering(t)
	var want bytes.Buffer
	read := make(chan []byte)
	go func() {
		got, _ := io.ReadAll(there)
		read <- got
	}()
	for i := range 300 {
		piece := bytes.Repeat([]byte{byte(i)}, 1+i*i%(2*directWrite))
		want.Write(piece)
		equal(t, "written", must(conn.Write(piece)), len(piece))
	}
	conn.Close()
	got := <-read
	holds(t, bytes.Equal(got, want.Bytes()), "%d bytes came, want these %d", len(got), want.Len())
	equal(t, "counted as written", conn.written.Load(), int64(want.Len()))
}

// TestGatheredPressure: a peer that reads nothing makes writers wait when 128 KiB wait and as many are under way, and is given up
// when it has taken nothing for as long as silence is borne; the writers and the reader learn why.
func TestGatheredPressure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, _ := gathering(t)
		start, accepted := time.Now(), 0
		var err error
		for err == nil {
			var n int
			n, err = conn.Write(make([]byte, 1<<10))
			accepted += n
			holds(t, time.Since(start) > 0 || accepted <= 2*maxGathered, "%d bytes were accepted at once", accepted)
		}
		took := time.Since(start)
		holds(t, took == time.Minute && accepted >= maxGathered && errors.Is(err, os.ErrDeadlineExceeded), "%v after %v and %d bytes", err, took, accepted)
		_, read := conn.Read(make([]byte, 1))
		holds(t, errors.Is(read, os.ErrDeadlineExceeded), "reading gives %v, want why the connection was closed", read)
	})
}

// TestGatheredSlowPeer: a peer that takes a byte now and then is not given up, whatever deadline net/http sets.
func TestGatheredSlowPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, there := gathering(t)
		conn.SetWriteDeadline(time.Now().Add(time.Second))
		conn.Write([]byte("slow"))
		for range 4 {
			time.Sleep(59 * time.Second)
			io.ReadFull(there, make([]byte, 1))
		}
		equal(t, "written", must(conn.Write([]byte("x"))), 1)
		go io.Copy(io.Discard, there)
		synctest.Wait()
	})
}

// TestGatheredClose: what was gathered gets a second to go out, and a second Close does not wait.
func TestGatheredClose(t *testing.T) {
	type row struct {
		reads time.Duration // when the peer begins to
		again bool          // it is closed a second time
		took  time.Duration
		got   string
	}
	inBubbles(t, map[string]row{
		"at once":  {got: "goaway"},
		"late":     {reads: 999 * time.Millisecond, took: 999 * time.Millisecond, got: "goaway"},
		"too late": {reads: time.Minute, took: time.Second},
		"twice":    {reads: time.Minute, again: true},
	}, func(t *testing.T, row row) {
		conn, there := gathering(t)
		conn.Write([]byte("goaway"))
		var wg sync.WaitGroup
		wg.Go(func() {
			time.Sleep(row.reads)
			got, _ := io.ReadAll(there)
			equal(t, "the peer got", string(got), row.got)
		})
		start := time.Now()
		if row.again {
			go conn.Close()
			synctest.Wait()
		}
		conn.Close()
		equal(t, "Close took", time.Since(start), row.took)
		wg.Wait()
	})
}
