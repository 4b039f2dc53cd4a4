package proxytest

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/procfs"
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

// WaitListening waits until the proxy listens, which it does before the tailnet is connected. The address comes from the kernel's
// tables, as the log tells it only later.
func (p *Proxy) WaitListening(timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(time.Millisecond) {
		if addr, err := listenAddr(p.PID); err == nil {
			p.setAddr(addr)
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

// Addr returns the address to dial, known after WaitRunning or WaitListening, "" before.
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

// Value sums the samples of a counter or gauge, or the counts of a histogram or summary, over all series that have the given
// labels (name, value, name, value, ...). An absent family counts as 0.
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
	process, err := procfs.NewProc(p.PID)
	if err != nil {
		return 0, fmt.Errorf("reading the proxy's memory: %w", err)
	}
	status, err := process.NewStatus()
	return int64(status.VmRSS), err
}

// listenAddr finds the TCP socket that the process listens on.
func listenAddr(pid int) (string, error) {
	process, err := procfs.NewProc(pid)
	if err != nil {
		return "", err
	}
	descriptors, err := process.FileDescriptorTargets()
	if err != nil {
		return "", err
	}
	fs, err := procfs.NewFS(fmt.Sprintf("/proc/%d", pid)) // its own network
	if err != nil {
		return "", err
	}
	//lint:ignore SA1019 what is recommended instead looks at this process's network only
	for _, table := range []func() (procfs.NetTCP, error){fs.NetTCP, fs.NetTCP6} {
		sockets, _ := table() // fails without IPv6
		for _, socket := range sockets {
			const listening = 10
			if socket.St == listening && slices.Contains(descriptors, fmt.Sprintf("socket:[%d]", socket.Inode)) {
				return net.JoinHostPort(socket.LocalAddr.String(), strconv.FormatUint(socket.LocalPort, 10)), nil
			}
		}
	}
	return "", fmt.Errorf("process %d listens on no TCP port", pid)
}
