package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"tailscale.com/client/tailscale/apitype"
)

const (
	// maxLookups is how many callers are looked up at once: more would only queue in tailscaled.
	maxLookups = 16
	// lookupTimeout bounds one lookup, the wait for its turn included.
	lookupTimeout = 2 * time.Second
)

// identity is who tailscaled says is at the other end of a connection. It is the zero value for
// callers that are not on the tailnet. Nothing else is to be trusted: headers can be forged, and
// tailnet connections reach a userspace tailscaled's neighbours from a loopback address.
type identity struct {
	node string // full name of the node in the tailnet
	user string // login name; for a tagged node, which has no user, its tags
}

// clientConn is a client's TCP connection, with what its requests, which come one after the other, share.
type clientConn struct {
	net.Conn
	alarm         alarm
	writeDeadline rollingDeadline
	betas         mergedList
	exchange      *exchange                     // being served; nil between two requests
	repeatBody    func() (io.ReadCloser, error) // of that exchange: a method value of each would be an allocation more

	// Who is behind it can't change while it lasts.
	known   atomic.Pointer[identity] // nil until tailscaled has given an answer
	mu      sync.Mutex
	pending chan struct{} // closed when the lookup under way ends; nil if there is none
}

// connKey is the context key of a request's *clientConn.
type connKey struct{}

// sendBuffer is how much of an answer the kernel keeps for its client, in bytes (it takes twice that for it). Left alone
// this grows to 4 MiB, which count towards a container's memory; and as a writer is woken only when a third of it is free,
// a client that reads slowly seems to have stopped. Answers of 10 MiB take a tenth longer for it, others do not.
const sendBuffer = 64 << 10

// withConn is an http.Server's ConnContext.
func withConn(ctx context.Context, conn net.Conn) context.Context {
	if tcp, ok := conn.(*net.TCPConn); ok {
		tcp.SetWriteBuffer(sendBuffer)
	}
	c := &clientConn{Conn: conn}
	c.repeatBody = func() (io.ReadCloser, error) { return c.exchange.repeatBody() }
	return context.WithValue(ctx, connKey{}, c)
}

// connOf returns the connection that r came over; nil without [withConn].
func connOf(r *http.Request) *clientConn {
	conn, _ := r.Context().Value(connKey{}).(*clientConn)
	return conn
}

// caller returns who is behind c, as far as it is known. pending is not nil while that is
// being looked up, and closed when it is done.
func (c *clientConn) caller() (who identity, pending <-chan struct{}) {
	if c == nil {
		return identity{}, nil
	}
	if known := c.known.Load(); known != nil {
		return *known, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending == nil {
		return identity{}, nil
	}
	return identity{}, c.pending
}

// admit sees to it that the caller behind c is looked up. If a known caller is required, it waits
// for the answer and refuses others; a lookup that fails refuses too.
func (t *tailnet) admit(ctx context.Context, c *clientConn, required bool) error {
	t.identify(c)
	if !required {
		return nil
	}
	who, pending := c.caller()
	if pending != nil {
		select {
		case <-pending:
		case <-ctx.Done():
			return departure(ctx)
		}
		who, _ = c.caller()
	}
	if who == (identity{}) {
		return errUnknownCaller
	}
	return nil
}

// identify starts a lookup of the caller behind c unless there is an answer or one is under way.
// One per connection: one per request would cost most of the proxy's throughput.
func (t *tailnet) identify(c *clientConn) {
	if c == nil || c.known.Load() != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pending != nil || c.known.Load() != nil {
		return
	}
	c.pending = make(chan struct{})
	go func() {
		who, err := t.whoIs(c.RemoteAddr().String())
		c.mu.Lock()
		defer c.mu.Unlock()
		if err == nil {
			c.known.Store(&who)
		} else {
			t.log.Debug("looking up a caller failed", "error", err.Error())
		}
		close(c.pending)
		c.pending = nil
	}()
}

// whoIs asks tailscaled who connected from addr. Not to be known is an answer, not an error.
func (t *tailnet) whoIs(addr string) (identity, error) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	select {
	case t.lookups <- struct{}{}:
		defer func() { <-t.lookups }()
	case <-ctx.Done():
		return identity{}, ctx.Err()
	}
	answer, err := t.client.WhoIs(ctx, addr)
	if errors.Is(err, errPeerNotFound) {
		return identity{}, nil
	}
	if err != nil {
		return identity{}, err
	}
	return identityOf(answer), nil
}

// identityOf picks node and user from tailscaled's answer.
func identityOf(answer *apitype.WhoIsResponse) identity {
	var who identity
	if node := answer.Node; node != nil {
		who.node = strings.TrimSuffix(node.Name, ".")
		who.user = strings.Join(node.Tags, ",")
	}
	if who.user == "" && answer.UserProfile != nil {
		who.user = answer.UserProfile.LoginName
	}
	return who
}
