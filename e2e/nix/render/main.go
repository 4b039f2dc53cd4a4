// Command render holds nix/yaml.nix and nix/toml.nix against real parsers: it
// makes thousands of values, among them all that a YAML reader likes to take for
// something else, lets Nix render them, and parses the result back. YAML is read
// as kubectl reads it (YAML 1.1) and as YAML 1.2.
//
// It needs nix on PATH, or -nix, and runs inside the e2e module:
//
//	go run ./nix/render [-nix PROGRAM] [-n VALUES] [-seed SEED]
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/BurntSushi/toml"
	yaml12 "gopkg.in/yaml.v3"
	yaml11 "sigs.k8s.io/yaml"
)

// A format is a file in nix/ and the parsers that have to understand what its function render makes.
type format struct {
	file    string
	value   func(*generator) any
	parsers map[string]func([]byte) (any, error)
}

var formats = []format{
	{
		file:  "yaml.nix",
		value: func(g *generator) any { return g.value(4) },
		parsers: map[string]func([]byte) (any, error){
			"YAML 1.1": func(text []byte) (v any, err error) { return v, yaml11.Unmarshal(text, &v, number) },
			"YAML 1.2": func(text []byte) (v any, err error) { return v, yaml12.Unmarshal(text, &v) },
		},
	},
	{
		file:  "toml.nix",
		value: func(g *generator) any { return g.table(3) },
		parsers: map[string]func([]byte) (any, error){
			"TOML": func(text []byte) (any, error) {
				v := map[string]any{}
				_, err := toml.NewDecoder(bytes.NewReader(text)).Decode(&v)
				return v, err
			},
		},
	},
}

// number keeps integers exact.
func number(d *json.Decoder) *json.Decoder {
	d.UseNumber()
	return d
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("render: ")
	nix := flag.String("nix", "nix", "the nix `program`")
	n := flag.Int("n", 3000, "how many `values` of each format")
	seed := flag.Uint64("seed", 1, "the `seed` of the values")
	flag.Parse()
	for _, f := range formats {
		g := &generator{rand.New(rand.NewPCG(*seed, 0))}
		values := make([]any, *n)
		for i := range values {
			values[i] = f.value(g)
		}
		texts, err := render(*nix, f.file, values)
		if err != nil || len(texts) != len(values) {
			log.Fatalf("nix rendered %d of %d values: %v", len(texts), len(values), err)
		}
		for i, value := range values {
			for parser, parse := range f.parsers {
				got, err := parse([]byte(texts[i]))
				if got, want := canonical(got), canonical(value); err != nil || got != want {
					log.Fatalf("%s, value %d: %s reads\n%s\nas\n%s\ninstead of\n%s\n%v", f.file, i, parser, texts[i], got, want, err)
				}
			}
		}
		fmt.Printf("render: nix/%s: %d values, %d bytes, parsed back as they were\n", f.file, *n, len(strings.Join(texts, "")))
	}
}

// render lets Nix render values with a file of nix/.
func render(nix, file string, values []any) (texts []string, err error) {
	program, err := filepath.Abs(filepath.Join("../nix", file))
	if err != nil {
		return nil, err
	}
	input, err := os.CreateTemp("", "values-*.json")
	if err != nil {
		return nil, err
	}
	defer os.Remove(input.Name())
	defer input.Close()
	if err := json.NewEncoder(input).Encode(values); err != nil {
		return nil, err
	}
	expression := fmt.Sprintf("map (import %s).render (builtins.fromJSON (builtins.readFile %s))", program, input.Name())
	cmd := exec.Command(nix, "--extra-experimental-features", "nix-command", "eval", "--impure", "--json", "--expr", expression)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", cmd, err)
	}
	err = json.Unmarshal(out, &texts)
	return texts, err
}

// canonical writes a value so that equal values of any parser are equal texts.
func canonical(value any) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		return fmt.Sprintf("%#v: %v", value, err)
	}
	return b.String()
}
