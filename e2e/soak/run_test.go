//go:build soak

package soak

import (
	"testing"

	"anthropic-oauth-proxy/e2e/fakeanthropic"
	"anthropic-oauth-proxy/e2e/proxytest"
)

// TestSoak runs both lanes. It takes time and the whole machine, hence the tag; the verdict's own tests do not.
func TestSoak(t *testing.T) {
	for _, protocol := range []fakeanthropic.Protocol{fakeanthropic.HTTP2, fakeanthropic.HTTP1} {
		t.Run(protocol.String(), func(t *testing.T) {
			t.Parallel()
			l := &lane{Scene: proxytest.NewScene(t), seed: *seed, wrong: t.Errorf, exchanges: map[int]*exchange{}}
			l.run(protocol)
		})
	}
}
