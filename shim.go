package main

import (
	"context"
	"errors"
	"strings"
	"time"

	"tailscale.com/client/tailscale/apitype"
)

const (
	// maxLookups is how many callers are looked up at once: more would only queue in tailscaled.
	maxLookups = 16
	// lookupTimeout bounds one lookup, the wait for its turn included.
	lookupTimeout = 10 * time.Second
)

// identity is who tailscaled says is at the other end of a connection. It is the zero value for
// callers that are not on the tailnet. Nothing else is to be trusted: headers can be forged, and
// tailnet connections reach a userspace tailscaled's neighbours from a loopback address.
type identity struct {
	node string // full name of the node in the tailnet
	user string // login name; for a tagged node, which has no user, its tags
}

// whoIs asks tailscaled who connected from addr. Not to be known is an answer, not an error.
func (t *tailnet) whoIs(ctx context.Context, addr string) (identity, error) {
	ctx, cancel := context.WithTimeout(ctx, lookupTimeout)
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
