package main

import (
	"bufio"
	"io"
	"strings"
)

// events calls each with the kind of every server-sent event until the stream
// ends. io.ErrUnexpectedEOF means that it ended without message_stop.
func events(r io.Reader, each func(kind string)) error {
	complete := false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		if kind, ok := strings.CutPrefix(lines.Text(), "event: "); ok {
			complete = kind == "message_stop"
			each(kind)
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if !complete {
		return io.ErrUnexpectedEOF
	}
	return nil
}
