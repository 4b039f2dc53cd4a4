package proxytest

import (
	"os"
	"regexp"
	"testing"
)

// Check ends the test with an error, if there is one.
func Check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Must is for what comes with an error, which ends the test: Must(f())(t).
func Must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		Check(t, err)
		return v
	}
}

// Find returns the first group of a pattern's first match in a file, where ^ and $ are those of lines.
func Find(t testing.TB, file, pattern string) string {
	t.Helper()
	found := regexp.MustCompile("(?m)" + pattern).FindSubmatch(Must(os.ReadFile(file))(t))
	if found == nil {
		t.Fatalf("%s has nothing like %s", file, pattern)
	}
	return string(found[1])
}
