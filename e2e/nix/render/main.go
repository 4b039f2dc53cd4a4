// Command render holds nix/yaml.nix and nix/toml.nix against real parsers: it makes thousands of values, among them all that a
// YAML reader likes to take for something else, lets Nix render them, and parses the result back. YAML is read as kubectl reads
// it (YAML 1.1) and as YAML 1.2.
//
// It needs nix on PATH, or -nix, and runs inside the e2e module:
//
//	go run ./nix/render [-nix PROGRAM] [-n VALUES] [-seed SEED]
package main

import (
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

// formats are the files in nix/, and the parsers that have to understand what their function render makes.
var formats = []struct {
	file    string
	config  bool // is all that it can hold
	parsers map[string]func([]byte, any) error
}{
	{"yaml.nix", false, map[string]func([]byte, any) error{"YAML 1.1": unmarshalYAML11, "YAML 1.2": yaml12.Unmarshal}},
	{"toml.nix", true, map[string]func([]byte, any) error{"TOML": toml.Unmarshal}},
}

// unmarshalYAML11 keeps integers exact.
func unmarshalYAML11(text []byte, v any) error {
	return yaml11.Unmarshal(text, v, func(d *json.Decoder) *json.Decoder {
		d.UseNumber()
		return d
	})
}

func main() {
	log.SetFlags(0)
	log.SetPrefix("render: ")
	nix := flag.String("nix", "nix", "the nix `program`")
	n := flag.Int("n", 3000, "how many `values` of each format")
	seed := flag.Uint64("seed", 1, "the `seed` of the values")
	flag.Parse()
	for _, f := range formats {
		g := &generator{rand.New(rand.NewPCG(*seed, 0)), f.config}
		values := g.list(*n, func() any {
			if f.config {
				return g.table(3)
			}
			return g.value(4)
		})
		texts, err := render(*nix, f.file, values)
		if err != nil || len(texts) != len(values) {
			log.Fatalf("nix rendered %d of %d values: %v", len(texts), len(values), err)
		}
		for i, value := range values {
			for parser, parse := range f.parsers {
				var got any
				err := parse([]byte(texts[i]), &got)
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
