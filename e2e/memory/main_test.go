//go:build vm

// Package memory holds the program, and tailscaled beside it, to the memory limits of the manifests, as clusters count memory:
// in control groups of version 2, where sockets count too. The machine of a developer seldom has them, so the tests run
// themselves in the VM lab:
//
//	CGO_ENABLED=0 go -C e2e test -count=1 -tags vm -timeout 20m ./memory
//
// The VM's processor is emulated, and 10 to 30 times slower than a real one: times here say nothing.
package memory

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// lab is the VM lab's command, from this folder.
const lab = "../../../shared/lab/vm/run"

// vmSeconds is how long the VM may run.
const vmSeconds = "900"

// inVM is set in the environment of the tests that run in the VM.
const inVM = "MEMORY_TEST_IN_VM"

func TestMain(m *testing.M) {
	if os.Getenv(inVM) != "" {
		os.Exit(m.Run())
	}
	os.Exit(boot())
}

// boot runs this very program in the VM, with the same flags.
func boot() (code int) {
	proxy := os.Getenv("MEMORY_TEST_PROXY") // another program to put to the test
	if proxy == "" {
		defer proxytest.Cleanup()
		var err error
		if proxy, err = proxytest.Build(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	dir, err := os.MkdirTemp("", "memory-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	var flags []string
	for _, arg := range os.Args[1:] {
		if !strings.HasPrefix(arg, "-test.testlogfile") && !strings.HasPrefix(arg, "-test.timeout") {
			flags = append(flags, "'"+arg+"'")
		}
	}
	command := fmt.Sprintf("%s=1 exec memory.test -test.timeout=%ss %s", inVM, vmSeconds, strings.Join(flags, " "))
	for name, path := range map[string]string{"memory.test": self, "proxy": proxy} {
		if err := os.Symlink(path, dir+"/"+name); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	vm := exec.Command(lab, vmSeconds, command, dir+"/memory.test", dir+"/proxy")
	vm.Stdout, vm.Stderr = os.Stdout, os.Stderr
	if err := vm.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "in the VM:", err)
		return 1
	}
	return 0
}
