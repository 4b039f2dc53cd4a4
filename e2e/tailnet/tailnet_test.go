package tailnet

import (
	"net/http"
	"testing"
)

func TestCloseReportsEscapes(t *testing.T) {
	t.Parallel()
	var tn Tailnet
	tn.startTrap()
	if resp, err := http.Get(tn.trap + "/log"); err != nil || resp.Body.Close() != nil {
		t.Fatal(err)
	}
	if tn.Close() == nil {
		t.Error("a request to the trap went unreported")
	}
}
