package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"tailscale.com/ipn"
)

// usageError is a command line that can't be carried out.
type usageError struct{ error }

// errFailed is a failure that was reported already.
var errFailed = errors.New("failed")

// doctor is what -check carries from one step to the next.
type doctor struct {
	cfg      *config
	upstream *upstream
	via      *url.URL // forward proxy, nil if none
	conn     net.Conn
}

// check tests the way from here to the API step by step, a line each, and stops at the first step
// that fails. There is neither shell nor curl in the image.
func check(ctx context.Context, o overrides, stdout io.Writer) error {
	started := time.Now()
	cfg, found, err := loadConfig(o)
	if err != nil {
		return err
	}
	source := o.configPath()
	if !found {
		source = "defaults, there is no " + source
	}
	report(stdout, "config", started, source)

	d := &doctor{cfg: cfg, upstream: newUpstream(cfg)}
	d.via, _ = http.ProxyFromEnvironment(&http.Request{URL: cfg.upstream}) // loadConfig has looked at it
	return d.examine(ctx, stdout)
}

// examine goes through the steps.
func (d *doctor) examine(ctx context.Context, stdout io.Writer) error {
	defer func() {
		if d.conn != nil {
			d.conn.Close()
		}
	}()
	for _, step := range []struct {
		name string
		run  func(context.Context) (string, error)
		hint string
	}{
		{"tailscaled", d.tailscaled, tailnetNotRunning.hint},
		{"dns", d.dns, "check the pod's DNS and its network policy"},
		{"tcp", d.tcp, "check outbound access (network policy, firewall)"},
		{"tls", d.tls, "check the CA certificates (SSL_CERT_FILE) and what intercepts TLS"},
		{"http", d.http, "the upstream accepts connections, but does not speak HTTP on them"},
	} {
		started := time.Now()
		ctx, cancel := context.WithTimeout(ctx, max(d.cfg.connectTimeout, pollTimeout))
		found, err := step.run(ctx)
		cancel()
		if p, ok := errors.AsType[*problem](err); ok {
			step.hint = p.kind.hint
		}
		if err != nil {
			report(stdout, step.name, started, "FAILED: "+err.Error()+"; "+step.hint)
			return errFailed
		}
		report(stdout, step.name, started, found)
	}
	return nil
}

// report writes the line of one step.
func report(w io.Writer, step string, started time.Time, result string) {
	fmt.Fprintf(w, "%-10s %7.1f ms  %s\n", step, float64(time.Since(started).Microseconds())/1e3, result)
}

// tailscaled asks the daemon for its state.
func (d *doctor) tailscaled(ctx context.Context) (string, error) {
	if d.cfg.local {
		return "skipped: -local has no tailnet", nil
	}
	status, err := newTailnet(d.cfg, slog.New(slog.DiscardHandler)).status(ctx)
	if err != nil {
		return "", err
	}
	v := &view{ran: true} // nothing to wait for: what it is not now, it lacks
	v.take(event{status: status, asked: time.Now()}, time.Now())
	if v.backend != ipn.Running {
		return "", v.problem(time.Now())
	}
	return fmt.Sprintf("%s as %s (%s)", status.BackendState, v.self.hostname, v.self.ip), nil
}

// firstHop is the host and port to connect to: the forward proxy's if there is one, else the upstream's.
func (d *doctor) firstHop() (host, port string) {
	u := d.cfg.upstream
	if d.via != nil {
		u = d.via
	}
	port = u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	return u.Hostname(), port
}

// dns resolves the first hop.
func (d *doctor) dns(ctx context.Context) (string, error) {
	host, _ := d.firstHop()
	addrs, err := net.DefaultResolver.LookupHost(ctx, host)
	return host + " is " + strings.Join(addrs, ", "), err
}

// tcp connects to the first hop.
func (d *doctor) tcp(ctx context.Context) (string, error) {
	host, port := d.firstHop()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return "", err
	}
	d.conn = conn
	result := "connected to " + conn.RemoteAddr().String()
	if d.via != nil {
		result += ", the forward proxy of the environment"
	}
	return result, nil
}

// tls shakes hands over the connection.
func (d *doctor) tls(ctx context.Context) (string, error) {
	switch {
	case d.via != nil:
		return "skipped: done within http, through the forward proxy", nil
	case d.cfg.upstream.Scheme == "http":
		return "skipped: the upstream is plain http", nil
	}
	conn := tls.Client(d.conn, tlsConfig(d.cfg.upstream.Hostname()))
	if err := conn.HandshakeContext(ctx); err != nil {
		return "", err
	}
	state := conn.ConnectionState()
	return fmt.Sprintf("%s, %s, certificate valid until %s", tls.VersionName(state.Version), state.NegotiatedProtocol,
		state.PeerCertificates[0].NotAfter.UTC().Format(time.DateOnly)), nil
}

// http sends one request without credentials: whatever status comes back, the way is open.
func (d *doctor) http(ctx context.Context) (string, error) {
	url := upstreamURL(d.cfg.upstream, target{path: "/"}, d.upstream.absolute)
	req := &http.Request{Method: http.MethodGet, URL: &url, Host: d.cfg.upstream.Host, Header: http.Header{}}
	conn, err := d.upstream.pool.reserve(ctx)
	if err != nil {
		return "", err
	}
	resp, err := conn.roundTrip(req.WithContext(ctx))
	if err != nil {
		return "", errors.New(describe(err))
	}
	defer resp.Body.Close()
	return fmt.Sprintf("%s answered %d", d.cfg.upstream, resp.StatusCode), nil
}
