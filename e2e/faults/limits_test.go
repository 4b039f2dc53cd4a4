//go:build faults

package faults

import (
	"strings"
)

// limitFaults are configurations at their limits.
var limitFaults = []fault{
	{name: "every number of the configuration at its minimum", outcome: "serves; a body of 1 MiB is taken, one byte more is refused", run: func(s *scene) {
		s.Start(s.server(count), `[proxy]
timeout_secs = 1
timeout_retries = 0
connect_timeout_secs = 1
max_connections = 1
max_body_mb = 1
body_memory_mb = 1
drain_timeout_secs = 0
`)
		s.Passed(s.upload(mib), 200, "1048576", 1)
		s.Refused(s.upload(mib+1), 400, "invalid_request", 0, "invalid_request")
	}},
	{name: "every number of the configuration at its maximum", outcome: "serves, bodies of any size up to 1 GiB; nothing is allocated in advance", release: true, run: func(s *scene) {
		s.Start(s.server(count), `[proxy]
timeout_secs = 3600
timeout_retries = 10
connect_timeout_secs = 300
max_connections = 100000
max_body_mb = 1024
body_memory_mb = 65536
drain_timeout_secs = 3600
`)
		rss, err := s.Proxy.RSS()
		if err != nil || rss > 32*mib {
			s.Errorf("the proxy holds %d MiB at the start (%v), want 32 at most", rss/mib, err)
		}
		s.Passed(s.upload(64*mib), 200, "67108864", 1)
		s.Passed(s.Send("POST", "/v1/messages", strings.NewReader("{}")), 200, "2", 1)
	}},
}
