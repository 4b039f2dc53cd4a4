//go:build vm

package memory

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// answered reads an answer and checks its status.
func answered(conn net.Conn, status int) error {
	conn.SetReadDeadline(time.Now().Add(10 * time.Minute))
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode != status {
		return fmt.Errorf("%d, %v; want %d", resp.StatusCode, err, status)
	}
	return nil
}

// TestClosedLoop: 1,000 clients with bodies of 50 KB, three each, one after the other.
func TestClosedLoop(t *testing.T) {
	b := newBox(t)
	b.all(1000, func(int) error {
		client := b.client()
		for range 3 {
			if err := b.post(client, count, 50_000); err != nil {
				return err
			}
		}
		return nil
	})
}

// TestUploads: 1,000 at once, of half a MiB, and some of the largest.
func TestUploads(t *testing.T) {
	b := newBox(t)
	b.all(1000, func(i int) error {
		n := mib / 2
		if i%50 == 0 {
			n = 10 * mib
		}
		return b.post(b.client(), count, n)
	})
}

// TestManyFields: 600 complete requests of 11,000 short header lines.
func TestManyFields(t *testing.T) {
	b := newBox(t)
	b.all(600, func(int) error {
		conn, err := b.dialSend("GET /held HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("a:\r\n", 11_000) + "\r\n")
		if conn == nil {
			return err
		}
		defer conn.Close()
		return answered(conn, 431)
	})
}

// TestStillReaders: of answers of 8 MiB.
func TestStillReaders(t *testing.T) {
	b := newBox(t)
	const readers = 50
	var answers []net.Conn
	for range readers {
		conn, err := b.dialSend("GET " + large + " HTTP/1.1\r\nHost: x\r\n\r\n")
		b.must(err)
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(16 << 10)
		answers = append(answers, conn)
	}
	time.Sleep(20 * time.Second)
	b.Logf("%d MiB", b.memory("current")/mib)
	b.all(len(answers), func(i int) error { return answered(answers[i], 200) })
}

// TestLargeResponseHeaders: 100 answers at once with 200 KiB of headers.
func TestLargeResponseHeaders(t *testing.T) {
	b := newBox(t)
	b.all(100, func(int) error { return b.post(b.client(), headers, 10) })
}
