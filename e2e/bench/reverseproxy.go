package main

import (
	"crypto/tls"
	"io"
	"log"
	"net/http"
	"net/http/httputil"
)

// reverseProxyMode is the first argument that makes this program the contestant reverseproxy instead of the bench.
const reverseProxyMode = "serve-reverseproxy"

// serveReverseProxy is the least that one would write: httputil.ReverseProxy, told to flush and to keep enough connections.
func serveReverseProxy(listen, upstream string) error {
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme = "https"
			r.Out.URL.Host = upstream
			r.Out.Host = serverName
			r.Out.Header.Add("Anthropic-Beta", beta)
		},
		Transport: &http.Transport{
			TLSClientConfig:     &tls.Config{ServerName: serverName},
			ForceAttemptHTTP2:   true,
			MaxIdleConnsPerHost: maxConnections,
			DisableCompression:  true,
		},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0), // clients that leave
	}
	return http.ListenAndServe(listen, http.MaxBytesHandler(proxy, 10<<20))
}
