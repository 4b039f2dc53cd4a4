package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"testing"
	"time"
)

// TestMain makes the test binary a server on stdin and stdout when SERVE_E2E is set, so that the oracles in e2e, which
// cannot import package main, can feed it: each servedRequest, as JSON, is answered by a servedResponse.
func TestMain(m *testing.M) {
	if os.Getenv("SERVE_E2E") == "" {
		os.Exit(m.Run())
	}
	if err := serveE2E(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "serving e2e:", err)
		os.Exit(1)
	}
}

// servedRequest asks for one thing. JSON carries bytes in base64.
type servedRequest struct {
	TOML    []byte   `json:"toml"`    // a document to decode
	Metrics *records `json:"metrics"` // what to record and write, if not nil
	Proxied []byte   `json:"proxied"` // the beginning of a connection to proxy.proxy_protocol_addr, if not empty
}

// servedResponse answers it.
type servedResponse struct {
	Errors   []string `json:"errors"`   // of the document
	Document any      `json:"document"` // if it has no errors: what it says, as toml-test's tagged JSON
	Page     []byte   `json:"page"`     // of the metrics
	Client   string   `json:"client"`   // of the connection, empty if its header names none
	Size     int      `json:"size"`     // of its header, 0 if there is more to come
}

func serveE2E(r io.Reader, w io.Writer) error {
	requests, responses := json.NewDecoder(r), json.NewEncoder(w)
	for {
		var request servedRequest
		if err := requests.Decode(&request); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		var response servedResponse
		switch {
		case request.Metrics != nil:
			response.Page = request.Metrics.proxy().metrics.page()
		case len(request.Proxied) > 0:
			client, size, err := parseProxyHeader(request.Proxied)
			if response.Size = size; err != nil {
				response.Errors = []string{err.Error()}
			} else if client.IsValid() {
				response.Client = client.String()
			}
		default:
			table, errs := parseTOML(request.TOML)
			response.Errors = tomlMessages(errs)
			if len(errs) == 0 {
				response.Document = tomlTree(table, tomlTagged)
			}
		}
		if err := responses.Encode(response); err != nil {
			return err
		}
	}
}

// records are what FuzzMetrics in e2e has the proxy record.
type records struct {
	Requests   []recorded      `json:"requests"`
	FirstBytes []time.Duration `json:"first_bytes"`
	Errors     []errorType     `json:"errors"`
	Retries    uint64          `json:"retries"`
	Places     int64           `json:"places"`
	Bytes      int64           `json:"bytes"`
	KeyExpiry  int64           `json:"key_expiry"` // in Unix time
	Revision   []byte          `json:"revision"`
}

// recorded is a request.
type recorded struct {
	Status  int           `json:"status"`
	Method  []byte        `json:"method"`
	Elapsed time.Duration `json:"elapsed"`
}

// proxy returns a new proxy that has recorded r.
func (r *records) proxy() *proxy {
	log := slog.New(slog.DiscardHandler)
	cfg := must(parseConfig("c.toml", nil, overrides{local: true}))
	counters := newMetrics(version, string(r.Revision))
	p := newProxy(cfg, newClientListener(nil, rigConnections), nil, counters, log)
	tn := newTailnet(&config{socket: "/nowhere", hostname: "x"}, log)
	tailnetGauges(tn, counters.gauge)
	tn.publish(&tailnetState{hostname: "x", keyExpiry: time.Unix(r.KeyExpiry, 0)})
	for _, request := range r.Requests {
		p.metrics.requestDone(request.Status, string(request.Method), request.Elapsed)
	}
	for _, elapsed := range r.FirstBytes {
		p.metrics.firstByte(elapsed)
	}
	for _, t := range r.Errors {
		p.metrics.upstreamError(t)
	}
	p.metrics.retries.Add(r.Retries)
	p.places.tryAcquire(r.Places)
	p.bodies.budget.tryAcquire(r.Bytes)
	return p
}
