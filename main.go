// Anthropic-oauth-proxy lets a team share Claude on a Tailscale tailnet.
//
// It runs as a node of the tailnet, beside a tailscaled that it talks to over a Unix socket, and
// forwards every request to Anthropic's API with the header that the API demands of OAuth bearer
// tokens, anthropic-beta: oauth-2025-04-20. Clients send their own tokens; the proxy holds none.
// Answers are streamed back as they arrive.
//
// It answers three paths itself: /health (is the tailnet connected), /livez (does the process
// serve) and /metrics (Prometheus). Log lines are JSON on standard output.
//
// A reader finds the life cycle in this file, a request's way in proxy.go, the configuration in
// config.go and tailscaled's states in tailnet.go.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	stdlog "log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// version is the program's; the Nix build and the manifests read it from this line.
const version = "0.1.0"

// revision is the commit, set at link time where the VCS stamp is not available.
var revision string

const (
	// clientIdle is how long an unused client connection is kept.
	clientIdle = 10 * time.Minute
	// healthConnections is how many there may be at once on proxy.health_addr.
	healthConnections = 64
	// lastBytes is how long connections get, after their requests are done or cut, to send what is buffered.
	lastBytes = 250 * time.Millisecond
)

func main() {
	// net/http's client reports oddities on the standard logger, with bytes of the answers in them.
	stdlog.SetOutput(io.Discard)
	err := run(context.Background(), os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	os.Exit(exitCode(err))
}

// exitCode returns 0 for a clean end, 2 for bad flags or configuration, and 1 for any other failure.
func exitCode(err error) int {
	_, usage := errors.AsType[usageError](err)
	_, config := errors.AsType[configError](err)
	switch {
	case err == nil:
		return 0
	case usage, config:
		return 2
	default:
		return 1
	}
}

// options is the command line, together with the environment.
type options struct {
	overrides
	checkConfig, check, version bool
	logLevel                    string
}

// run is the program. What it returns has been reported on stdout or stderr.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	opts, err := parseArgs(args, getenv, stdout)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err == nil {
		switch {
		case opts.version:
			_, err = fmt.Fprintf(stdout, "anthropic-oauth-proxy %s, revision %s, %s\n", version, buildRevision(), runtime.Version())
		case opts.checkConfig:
			err = checkConfig(opts.overrides, stdout, stderr)
		case opts.check:
			err = check(ctx, opts.overrides, stdout)
		default:
			err = serve(ctx, opts, stdout)
		}
	}
	if err != nil && !errors.Is(err, errFailed) {
		fmt.Fprintln(stderr, err)
	}
	return err
}

// parseArgs reads flags and environment. Asked for help, it prints that and returns flag.ErrHelp.
func parseArgs(args []string, getenv func(string) string, stdout io.Writer) (*options, error) {
	var o options
	flags := flag.NewFlagSet("anthropic-oauth-proxy", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.path, "config", getenv("CONFIG_PATH"), "")
	flags.StringVar(&o.listen, "listen", "", "")
	flags.StringVar(&o.upstream, "upstream", "", "")
	flags.BoolVar(&o.local, "local", false, "")
	flags.BoolVar(&o.checkConfig, "check-config", false, "")
	flags.BoolVar(&o.check, "check", false, "")
	flags.BoolVar(&o.version, "version", false, "")
	o.socket = getenv("TAILSCALE_SOCKET")
	o.logLevel = getenv("LOG_LEVEL")

	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, usage)
		return nil, err
	case err == nil && flags.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	if err != nil {
		return nil, usageError{fmt.Errorf("anthropic-oauth-proxy: %w; -h lists what there is", err)}
	}
	return &o, nil
}

const usage = `anthropic-oauth-proxy lets a team share Claude on a Tailscale tailnet: it forwards requests to
Anthropic's API and adds the header that OAuth tokens need. It holds no credentials.

  anthropic-oauth-proxy                      serve the tailnet, beside a tailscaled
  anthropic-oauth-proxy -local               try it without one; then, in another terminal:
                                             ANTHROPIC_BASE_URL=http://127.0.0.1:8080 claude
  anthropic-oauth-proxy -check               test the way from here to the API by steps, and exit
  anthropic-oauth-proxy -config FILE -check-config
                                             validate a file, print what it comes to, and exit
Flags:
  -config PATH    TOML file. Default ` + defaultConfigPath + `, if there
  -listen ADDR    listen on HOST:PORT instead of proxy.listen_addr (` + defaultListen + `)
  -upstream URL   forward to URL instead of proxy.upstream_url (` + defaultUpstream + `)
  -local          no tailnet: listen on ` + defaultLocal + ` unless -listen is given. For trying it
                  out: whoever reaches the port may use it
  -check, -check-config, -version, -h

Environment:
  CONFIG_PATH       as -config
  LOG_LEVEL         error, warn, info (default), debug or trace
  TAILSCALE_SOCKET  tailscaled's, instead of tailscale.socket (` + defaultSocket + `)
  HTTPS_PROXY, HTTP_PROXY, NO_PROXY   how to reach the upstream, if not directly

Flags win over the environment, that over the file, that over the defaults. Exit codes: 0 clean
shutdown or check passed, 1 failure, 2 bad flags or configuration.
`

// checkConfig prints the effective configuration; warnings go to stderr.
func checkConfig(o overrides, stdout, stderr io.Writer) error {
	cfg, _, err := loadConfig(o)
	if err != nil {
		return err
	}
	for _, warning := range cfg.warnings {
		fmt.Fprintf(stderr, "warning: %s\n", warning)
	}
	_, err = io.WriteString(stdout, cfg.toml())
	return err
}

// serve runs the proxy until a signal, ctx's end or a failure.
func serve(ctx context.Context, opts *options, stdout io.Writer) error {
	signal.Ignore(syscall.SIGPIPE) // of a log reader that has gone
	level, ok := parseLevel(opts.logLevel)
	log, lines := newLogger(stdout, level)
	defer lines.flush(lastBytes)
	log.Info("starting anthropic-oauth-proxy", "version", version, "revision", buildRevision())
	if !ok {
		log.Warn("LOG_LEVEL is not one of error, warn, info, debug, trace; using info", "log_level", opts.logLevel)
	}
	if opts.local && isTerminal(stdout) { // somebody tries it out
		addr := cmp.Or(opts.listen, defaultLocal)
		log.Info("no tailnet: it listens on " + addr + "; in another terminal, type ANTHROPIC_BASE_URL=http://" + addr + " claude")
	}
	cfg, err := loadAndLog(opts.overrides, log)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)

	ports, err := listen(cfg.listenAddr, cfg.proxyProtocolAddr, cfg.healthAddr)
	if err != nil {
		log.Error("can't listen: end the program that uses the port, or choose another one with -listen, proxy.listen_addr, proxy.proxy_protocol_addr or proxy.health_addr", "error", err.Error())
		return errFailed
	}
	return newLife(cfg, ports, tuneMemory(cfg), log, lines).live(ctx, signals)
}

// isTerminal reports whether w shows what is written to a person.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

const (
	// gcPercent is the default of GOGC here. Next to nothing of what a small request leaves behind is live: collecting
	// it a quarter as often saves a tenth of the CPU time, and 800 saves no more.
	gcPercent = 400
	// memoryPerRequest is what one open request takes without its body, in bytes.
	memoryPerRequest = 64 << 10
	// memoryPerConnection is what a connection takes of the soft limit (GOMEMLIMIT), in bytes.
	memoryPerConnection = 38 << 10
	// kernelPerConnection is what its socket buffers take, in bytes. They count towards a container's limit and not towards the
	// soft one; what the former is larger by is taken to be a third of the latter.
	kernelPerConnection = 24 << 10
	// memoryAtRest is what the process takes with no connection at all, with room for garbage, in bytes.
	memoryAtRest = 32 << 20
	// fewestConnections may be open at once, however small the memory limit is.
	fewestConnections = 16
)

// tuneMemory sets what the environment leaves open: GOGC, and a soft limit like GOMEMLIMIT that the configuration's largest
// load fits, beyond which gcPercent would let garbage grow. It returns how many client connections the limit carries
// beside the bodies.
func tuneMemory(cfg *config) (connections int) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	if !underMemoryLimit() {
		debug.SetMemoryLimit(memoryAtRest + cfg.bodyMemory + cfg.maxConnections*memoryPerRequest)
	}
	limit := debug.SetMemoryLimit(-1)
	return int(max(fewestConnections, min((limit-memoryAtRest-cfg.bodyMemory)/memoryPerConnection, limit/3/kernelPerConnection)))
}

// listen binds addresses; an empty one has a nil listener. An IPv4 address stays one: net.Listen would make [::] of 0.0.0.0.
// Under a memory limit that was given, connections get small receive buffers.
func listen(addrs ...string) (listeners []net.Listener, err error) {
	var buffers net.ListenConfig
	if underMemoryLimit() {
		buffers.SetMultipathTCP(false) // it has no setBufferLock
		buffers.Control = func(_, _ string, socket syscall.RawConn) error {
			return socket.Control(func(fd uintptr) { // connections inherit it
				syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, receiveBuffer)
				setBufferLock(int(fd), false)
			})
		}
	}
	listeners = make([]net.Listener, len(addrs))
	for i, addr := range addrs {
		if addr == "" {
			continue
		}
		network := "tcp"
		if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().Is4() {
			network = "tcp4"
		}
		if listeners[i], err = buffers.Listen(context.Background(), network, addr); err != nil {
			return nil, err
		}
	}
	return listeners, nil
}

// loadAndLog loads the configuration and says so.
func loadAndLog(o overrides, log *slog.Logger) (*config, error) {
	log.Info("loading configuration", "path", o.configPath())
	cfg, found, err := loadConfig(o)
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			log.Error("configuration refused", "error", strings.TrimSpace(line))
		}
		return nil, err
	}
	if !found {
		log.Info("no configuration file, using defaults", "path", o.configPath())
	}
	for _, warning := range cfg.warnings {
		log.Warn("configuration: " + warning)
	}
	log.Info("configuration loaded", "listen_addr", cfg.listenAddr, "upstream_url", cfg.upstream.String(),
		"timeout_secs", seconds(cfg.timeout), "max_connections", cfg.maxConnections, "require_tailnet", cfg.requireTailnet)
	return cfg, nil
}

// life is a process that serves: its parts, from the bound port to the last byte.
type life struct {
	cfg     *config
	log     *slog.Logger
	clients *clientListener
	service net.Listener // nil without proxy.proxy_protocol_addr
	probes  net.Listener // nil without proxy.health_addr
	tailnet *tailnet     // nil with -local
	proxy   *proxy
	server  *http.Server
	cut     context.CancelCauseFunc // ends all requests
}

// newLife puts the parts together; nothing runs yet. listeners are those of clients, of a Tailscale Service's clients and
// of probes and scrapes; the last two may be nil. connections is how many the first two may have open together.
func newLife(cfg *config, listeners []net.Listener, connections int, log *slog.Logger, lines *lineWriter) *life {
	l := &life{cfg: cfg, log: log, clients: newClientListener(listeners[0], connections)}
	if !cfg.local {
		l.tailnet = newTailnet(cfg, log)
	}
	if listeners[1] != nil {
		l.service = &serviceListener{
			Listener: listeners[1], clients: l.clients, refused: &throttledWarnings{log: log},
			daemon: func() (uint32, error) { return fileOwner(cfg.socket) }, whoIs: l.tailnet.whoIs,
		}
	}
	if listeners[2] != nil {
		l.probes = newClientListener(listeners[2], healthConnections)
	}
	counters := newMetrics(version, buildRevision())
	l.proxy = newProxy(cfg, l.clients, l.tailnet, counters, log)
	tailnetGauges(l.tailnet, counters.gauge)
	counters.counter("proxy_log_lines_dropped_total", "Log lines that nobody read in time.", func() (float64, bool) { return float64(lines.dropped.Load()), true })
	base, cut := context.WithCancelCause(context.Background())
	l.cut = cut
	l.server = l.newServer(l.proxy, base)
	return l
}

// newServer returns a server of requests, whose contexts come from base.
func (l *life) newServer(handler http.Handler, base context.Context) *http.Server {
	return &http.Server{
		Handler:                      handler,
		ReadHeaderTimeout:            headerTime,
		ReadTimeout:                  firstRequestTime + 2*headerTime, // for what net/http answers itself: ServeHTTP lifts it
		IdleTimeout:                  clientIdle,
		MaxHeaderBytes:               maxHeader - 4<<10, // net/http grants 4 KiB more than that
		DisableGeneralOptionsHandler: true,              // OPTIONS * goes upstream too
		BaseContext:                  func(net.Listener) context.Context { return base },
		ConnContext:                  withConn,
		ConnState:                    connState,
		ErrorLog:                     stdlog.New(&throttledWarnings{log: l.log}, "", 0),
	}
}

// live serves until a signal or ctx's end, when it returns nil, even if requests had to be cut; or until a failure.
func (l *life) live(ctx context.Context, signals <-chan os.Signal) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	defer l.server.Close()
	served := make(chan error, 3)
	go func() { served <- l.server.Serve(l.clients) }()
	if l.service != nil {
		go func() { served <- l.server.Serve(l.service) }()
	}
	if l.probes != nil { // until the process ends
		probed := l.newServer(&l.proxy.own, context.Background())
		defer probed.Close()
		go func() { served <- probed.Serve(l.probes) }()
	}
	running := make(chan error, 1)
	go func() { running <- l.start(ctx) }()
	for {
		select {
		case err := <-running:
			if err != nil {
				return err
			}
		case err := <-served:
			l.log.Error("can't accept connections any more", "error", err.Error())
			return errFailed
		case sig := <-signals:
			l.log.Info("received " + signalName(sig) + ", shutting down")
			l.shutDown(signals)
			return nil
		case <-ctx.Done():
			l.log.Info("told to stop, shutting down")
			l.shutDown(signals)
			return nil
		}
	}
}

// start takes the process from the bound port to Running.
func (l *life) start(ctx context.Context) error {
	if l.tailnet != nil {
		l.log.Info("state: ConnectingTailnet", "socket", l.cfg.socket)
		go l.tailnet.follow(ctx)
		err := l.tailnet.connect(ctx)
		if p, ok := errors.AsType[*problem](err); ok {
			l.log.Error(p.kind.message, "error", p.Error(), "hint", p.kind.hint)
			return errFailed
		} else if err != nil {
			return nil // told to stop meanwhile
		}
		now := l.tailnet.current()
		l.log.Info("state: Starting", "tailnet_hostname", now.hostname, "tailnet_ip", now.ip)
	} else {
		l.log.Info("state: Starting", "tailnet", "disabled")
	}
	where := []any{"addr", l.clients.Addr().String()}
	if l.service != nil {
		where = append(where, "proxy_protocol_addr", l.service.Addr().String())
	}
	l.log.Info("state: Running — accepting requests", where...)
	return nil
}

// shutDown ends the process' requests: new and queued ones at once, those in flight within the
// drain timeout. A second signal ends it at once.
func (l *life) shutDown(signals <-chan os.Signal) {
	impatient, stop := context.WithCancel(context.Background())
	defer stop()
	go func() {
		select {
		case sig := <-signals:
			l.log.Warn("received " + signalName(sig) + " again, exiting at once")
			stop()
		case <-impatient.Done():
		}
	}()
	l.clients.Close()
	if l.service != nil {
		l.service.Close()
	}
	l.server.SetKeepAlivesEnabled(false)
	remaining := l.proxy.drain(impatient, l.cfg.drainTimeout)
	switch {
	case remaining == 0:
		l.log.Info("all in-flight requests drained")
	case impatient.Err() == nil:
		l.log.Warn("drain timeout exceeded, forcing shutdown", "remaining", remaining, "drain_timeout_secs", seconds(l.cfg.drainTimeout))
		fallthrough
	default:
		l.cut(errShuttingDown)
		l.proxy.drain(context.Background(), lastBytes) // for their answers and log lines
	}
	defer time.AfterFunc(lastBytes, l.proxy.hurry).Stop()
	grace, cancel := context.WithTimeout(context.Background(), lastBytes)
	defer cancel()
	l.server.Shutdown(grace)
	if impatient.Err() != nil {
		return
	}
	l.proxy.logging.Wait()
	l.log.Info("shutdown complete")
}

// signalName returns a signal's usual name.
func signalName(sig os.Signal) string {
	return map[os.Signal]string{syscall.SIGTERM: "SIGTERM", syscall.SIGINT: "SIGINT", syscall.SIGHUP: "SIGHUP"}[sig]
}

// buildRevision returns the commit that the program was built from, as far as it is known.
func buildRevision() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return cmp.Or(revision, s.Value)
			}
		}
	}
	return cmp.Or(revision, "unknown")
}
