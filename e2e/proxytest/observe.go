package proxytest

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// WaitRunning waits until the proxy says that it accepts requests, as it does
// once it is connected to the tailnet (at once with -local).
func (p *Proxy) WaitRunning(timeout time.Duration) error {
	line, err := p.WaitLog(MsgRunning, timeout)
	if err != nil {
		return err
	}
	p.setAddr(line.Text("addr"))
	return nil
}

// WaitListening waits until the proxy listens, which it does before the tailnet
// is connected. The address comes from the kernel's tables, as the log tells it
// only later.
func (p *Proxy) WaitListening(timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(time.Millisecond) {
		if addr, err := listenAddr(p.PID); err == nil {
			p.setAddr(addr.String())
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("the proxy ended (%v) before it listened; stderr: %s", p.state, p.stderr)
		default:
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the proxy does not listen after %v; the log is:\n%s", timeout, p.stdout)
		}
	}
}

// setAddr records the address to dial. A wildcard is reached through loopback.
func (p *Proxy) setAddr(addr string) {
	host, port, err := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); err == nil && ip != nil && ip.IsUnspecified() {
		loopback := "127.0.0.1"
		if ip.To4() == nil {
			loopback = "::1"
		}
		addr = net.JoinHostPort(loopback, port)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addr = addr
}

// Addr returns the address to dial, known after WaitRunning or WaitListening,
// "" before.
func (p *Proxy) Addr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

// URL returns the base URL, without a slash at its end.
func (p *Proxy) URL() string { return "http://" + p.Addr() }

// Health fetches /health.
func (p *Proxy) Health() (status int, body []byte, err error) {
	return p.get("/health")
}

// Metrics fetches and parses /metrics.
func (p *Proxy) Metrics() (Metrics, error) {
	status, body, err := p.get("/metrics")
	if err != nil {
		return nil, err
	}
	if status != http.StatusOK {
		return nil, fmt.Errorf("GET /metrics: status %d: %s", status, body)
	}
	parser := expfmt.NewTextParser(model.LegacyValidation)
	families, err := parser.TextToMetricFamilies(bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("parsing /metrics: %w\n%s", err, body)
	}
	return families, nil
}

func (p *Proxy) get(path string) (int, []byte, error) {
	client := http.Client{Timeout: Timeout}
	resp, err := client.Get(p.URL() + path)
	if err != nil {
		return 0, nil, fmt.Errorf("observing the proxy: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, nil, fmt.Errorf("observing the proxy: reading %s: %w", path, err)
	}
	return resp.StatusCode, body, nil
}

// Metrics are the families of one scrape by name.
type Metrics map[string]*dto.MetricFamily

// Value sums the samples of a counter or gauge, or the counts of a histogram or
// summary, over all series that have the given labels (name, value, name,
// value, ...). An absent family counts as 0.
func (m Metrics) Value(name string, labels ...string) float64 {
	var sum float64
	for _, metric := range m[name].GetMetric() {
		if hasLabels(metric, labels) {
			sum += metric.GetCounter().GetValue() + metric.GetGauge().GetValue() +
				float64(metric.GetHistogram().GetSampleCount()) + float64(metric.GetSummary().GetSampleCount())
		}
	}
	return sum
}

// Has reports whether there is a series with the given labels.
func (m Metrics) Has(name string, labels ...string) bool {
	return slices.ContainsFunc(m[name].GetMetric(), func(metric *dto.Metric) bool {
		return hasLabels(metric, labels)
	})
}

func hasLabels(metric *dto.Metric, want []string) bool {
	for pair := range slices.Chunk(want, 2) {
		if !slices.ContainsFunc(metric.GetLabel(), func(l *dto.LabelPair) bool {
			return l.GetName() == pair[0] && l.GetValue() == pair[1]
		}) {
			return false
		}
	}
	return true
}

// RSS returns the process's resident memory in bytes.
func (p *Proxy) RSS() (int64, error) {
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.PID))
	if err != nil {
		return 0, fmt.Errorf("reading the proxy's memory: %w", err)
	}
	fields := strings.Fields(string(statm))
	if len(fields) < 2 {
		return 0, fmt.Errorf("reading the proxy's memory: unexpected statm %q", statm)
	}
	pages, err := strconv.ParseInt(fields[1], 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// listenAddr finds the TCP socket that the process listens on.
func listenAddr(pid int) (netip.AddrPort, error) {
	inodes := map[string]bool{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, link := range links {
		target, _ := os.Readlink(link) // a file closed meanwhile is no socket of interest
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			continue // no IPv6, or the process is gone
		}
		addr, ok := findListener(f, inodes)
		f.Close()
		if ok {
			return addr, nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("process %d listens on no TCP port", pid)
}

// findListener scans a table of /proc/net for a listening socket (state 0A) with
// one of the inodes.
func findListener(table io.Reader, inodes map[string]bool) (netip.AddrPort, bool) {
	const local, state, inode = 1, 3, 9 // columns
	for lines := bufio.NewScanner(table); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) > inode && f[state] == "0A" && inodes[f[inode]] {
			addr, err := parseProcAddr(f[local])
			return addr, err == nil
		}
	}
	return netip.AddrPort{}, false
}

// parseProcAddr parses "0100007F:1F90": 32-bit words in the machine's order
// (little-endian on every machine that this runs on), then the port.
func parseProcAddr(s string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	ip, ok := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("parsing address %q", s)
	}
	return netip.AddrPortFrom(ip, uint16(n)), nil
}
