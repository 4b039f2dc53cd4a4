package tailnet

import (
	"net/http"
	"testing"
)

func TestCloseReportsEscapes(t *testing.T) {
	t.Parallel()
	trap := startTrap()
	resp, err := http.Get(trap.server.URL + "/log")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if err := trap.close(); err == nil {
		t.Error("a request to the trap went unreported")
	}
}
