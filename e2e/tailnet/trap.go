package tailnet

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
)

// trap is the HTTP proxy that every daemon is told to use for what is not on
// loopback. A hermetic tailnet never calls it: a call is a test failure.
type trap struct {
	server *http.Server
	url    string

	mu     sync.Mutex
	caught []string
}

func startTrap() (*trap, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for the trap proxy: %w", err)
	}
	t := &trap{url: "http://" + ln.Addr().String()}
	t.server = &http.Server{Handler: t}
	go t.server.Serve(ln)
	return t, nil
}

// ServeHTTP refuses the request and remembers where it wanted to go.
func (t *trap) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t.mu.Lock()
	t.caught = append(t.caught, r.Method+" "+r.RequestURI)
	t.mu.Unlock()
	w.WriteHeader(http.StatusForbidden)
}

// close ends the trap and reports what it caught.
func (t *trap) close() error {
	t.server.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.caught) > 0 {
		return fmt.Errorf("a daemon tried to leave this machine: %s", strings.Join(t.caught, ", "))
	}
	return nil
}
