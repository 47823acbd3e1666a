// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package registry

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// TestPullOnPools pulls into real pools, and into one that is full until a file is removed.
func TestPullOnPools(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			dir := kind.Pool(t)
			blobs, err := OpenBlobs(filepath.Join(dir, "blobs"))
			if err != nil {
				t.Fatal(err)
			}
			s := newServer(t)
			ref := s.push(t, imageOf(t, static.NewLayer(layer(t, "file", 32<<20), types.OCIUncompressedLayer)), "v1")
			testenv.Fill(t, dir)
			_, err = impatient(Config{}).Pull(t.Context(), ref, blobs)
			fails(t, err, pool.ErrFull, "delete volumes", ref)
			if n := len(blobs.held); n != 0 {
				t.Errorf("%d parts of blobs still take space", n)
			}
			if err := os.Remove(filepath.Join(dir, "filler")); err != nil {
				t.Fatal(err)
			}
			testenv.Run(t, "sync", "--file-system", dir)
			img, err := impatient(Config{}).Pull(t.Context(), ref, blobs)
			if err != nil {
				t.Fatal(err)
			}
			img.Close()
		})
	}
}
