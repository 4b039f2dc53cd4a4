// Command release makes one OCI image layout, with an index of several architectures, of images that are docker-archives.
// The same archives make the same bytes.
//
//	go -C e2e run ./release FOLDER ARCHIVE.tar...
package main

import (
	"log"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("release: ")
	if len(os.Args) < 3 {
		log.Fatal("usage: release FOLDER ARCHIVE.tar...")
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, archive := range os.Args[2:] {
		image, err := tarball.ImageFromPath(archive, nil)
		check(err)
		config, err := image.ConfigFile()
		check(err)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        mutate.MediaType(mutate.ConfigMediaType(image, types.OCIConfigJSON), types.OCIManifestSchema1),
			Descriptor: v1.Descriptor{Platform: config.Platform()},
		})
	}
	_, err := layout.Write(os.Args[1], index)
	check(err)
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
