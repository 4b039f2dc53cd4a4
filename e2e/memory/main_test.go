//go:build vm

// Package memory holds the program, and tailscaled beside it, to the memory limits of the manifests, as clusters count memory:
// in control groups of version 2, where sockets count too. The machine of a developer seldom has them, so the tests run
// themselves in the VM lab:
//
//	CGO_ENABLED=0 go -C e2e test -count=1 -tags vm -timeout 40m ./memory
//
// The VM's only processor is emulated: 250 million instructions are a second in it, whatever they take. Times here say nothing.
package memory

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"anthropic-oauth-proxy/e2e/proxytest"
)

// vmSeconds is how long the VM may run. It takes 6 minutes in its own time.
const vmSeconds = "2300"

// noAES has both ends of TLS choose ChaCha20, for which an emulator needs a third less time.
const noAES = "GODEBUG=cpu.aes=off,cpu.pclmulqdq=off"

// inVM is set, to the name of the program, in the environment of the tests that run in the VM.
const inVM = "MEMORY_TEST_IN_VM"

func TestMain(m *testing.M) {
	if os.Getenv(inVM) != "" {
		os.Exit(m.Run())
	}
	if err := boot(); err != nil {
		fmt.Fprintln(os.Stderr, "in the VM:", err)
		os.Exit(1)
	}
}

// boot runs this very program in the VM, with the same flags.
func boot() error {
	defer proxytest.Cleanup()
	proxy, err := proxytest.Build()
	self, selfErr := os.Executable()
	if err := errors.Join(err, selfErr); err != nil {
		return err
	}
	command := fmt.Sprintf("%s %s=%s exec %s -test.timeout=%ss", noAES, inVM, filepath.Base(proxy), filepath.Base(self), vmSeconds)
	for _, arg := range os.Args[1:] {
		if !strings.HasPrefix(arg, "-test.testlogfile") && !strings.HasPrefix(arg, "-test.timeout") {
			command += " '" + arg + "'"
		}
	}
	vm := exec.Command("./vm", vmSeconds, command, self, proxy)
	vm.Stdout, vm.Stderr = os.Stdout, os.Stderr
	return vm.Run()
}
