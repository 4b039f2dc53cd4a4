// Command release makes one OCI image layout, with an index of several architectures, of images that are docker-archives.
// The same archives make the same bytes.
//
//	go -C e2e run ./release FOLDER ARCHIVE.tar...
package main

import (
	"fmt"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: release FOLDER ARCHIVE.tar...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(folder string, archives []string) error {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, path := range archives {
		image, err := tarball.ImageFromPath(path, nil)
		if err != nil {
			return fmt.Errorf("reading %s: %w", path, err)
		}
		config, err := image.ConfigFile()
		if err != nil {
			return fmt.Errorf("reading %s: %w", path, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        mutate.MediaType(mutate.ConfigMediaType(image, types.OCIConfigJSON), types.OCIManifestSchema1),
			Descriptor: v1.Descriptor{Platform: config.Platform()},
		})
	}
	if _, err := layout.Write(folder, index); err != nil {
		return fmt.Errorf("writing the layout: %w", err)
	}
	return nil
}
