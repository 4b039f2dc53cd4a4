//go:build !linux

package main

import (
	"net"
	"time"
)

// watchHangup does nothing here: a queued client that leaves is noticed when its turn comes.
func watchHangup(net.Conn, func()) (stop func()) { return func() {} }

// setUserTimeout does nothing here: only Linux has the option.
func setUserTimeout(net.Conn, time.Duration) {}
