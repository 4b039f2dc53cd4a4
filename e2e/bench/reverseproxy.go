package main

import (
	"crypto/tls"
	"errors"
	"flag"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
	"os"
)

// reverseProxyMode is the first argument that makes this program the contestant
// reverseproxy instead of the bench.
const reverseProxyMode = "serve-reverseproxy"

// runReverseProxy is the least that one would write with the standard library:
// httputil.ReverseProxy, told to flush and to keep enough connections.
func runReverseProxy(args []string) error {
	flags := flag.NewFlagSet(reverseProxyMode, flag.ContinueOnError)
	flags.SetOutput(os.Stderr)
	listen := flags.String("listen", "", "address")
	upstream := flags.String("upstream", "", "address")
	serverName := flags.String("server-name", "", "in the upstream's certificate")
	if err := flags.Parse(args); err != nil {
		return errors.Join(errUsage, err)
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme = "https"
			r.Out.URL.Host = *upstream
			r.Out.Host = *serverName
			r.Out.Header.Add("Anthropic-Beta", beta)
		},
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{ServerName: *serverName},
			ForceAttemptHTTP2:   true,
			MaxIdleConnsPerHost: maxConnections,
			DisableCompression:  true,
		},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // clients that leave
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, 10<<20)
		proxy.ServeHTTP(w, r)
	})
	return http.ListenAndServe(*listen, handler)
}
