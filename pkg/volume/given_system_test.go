// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// diskBytes is the size of the disk that newDisks makes, and diskWord is at its end.
const (
	diskBytes = 5 << 20
	diskWord  = "the last words of a disk"
)

// newDisks makes a node whose contents are those of theContents. Each of them that is a disk has the same
// bytes. builds counts the templates that were made.
func newDisks(t *testing.T, kind testenv.Kind) (n *node, builds *atomic.Int32) {
	n = newNodeWith(t, kind, 2<<30, Config{Content: theContents})
	builds = new(atomic.Int32)
	n.contents.templates = template.NewStore(template.Config{
		Pool: n.pool, Fingerprint: func(diskfs.Spec) (string, error) { return "0123456789abcdef", nil },
		Format: func(_ context.Context, f *os.File, spec diskfs.Spec) (template.Provenance, error) {
			builds.Add(1)
			_, err := f.WriteAt([]byte(diskWord), diskBytes-int64(len(diskWord)))
			return template.Provenance{Fingerprint: "0123456789abcdef", Content: "sha256:00"}, errors.Join(err, f.Sync())
		},
	})
	t.Cleanup(n.contents.templates.Close)
	return n, builds
}

// TestDiskContent makes disks of several sizes from one content: as disk.img of a pod, and as claims.
func TestDiskContent(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n, builds := newDisks(t, kind)
			r := n.request("inline", "", 64<<20)
			r.Mode, r.Spec.Content = image.ModeDiskImage, "disk"
			n.mustPublish(r)
			mustBeDisk(t, filepath.Join(r.Target, image.DiskName), 64<<20)
			if res := n.mustPublish(r); !res.Existed {
				t.Error("the same request made another volume")
			}
			n.contentOf = nil // the operator has taken it from the list
			if res := n.mustPublish(r); !res.Existed {
				t.Error("once its content was removed, the same request made another volume")
			}
			n.contentOf = theContents

			for _, mode := range []image.Mode{image.ModeBlock, image.ModeDiskImage} {
				for _, p := range []image.Provisioning{image.Thin, image.Thick} {
					claim := ClaimRequest{Name: "claim", Mode: mode, Provisioning: p, Spec: diskfs.Spec{Filesystem: "raw", Size: 7 << 20, Content: "disk"}}
					made, _, err := n.CreateClaim(t.Context(), claim)
					if err != nil {
						t.Fatal(err)
					}
					mustBeDisk(t, n.pool.Volume(made.ID), 7<<20)
					if _, res, err := n.CreateClaim(t.Context(), claim); err != nil || !res.Existed {
						t.Errorf("the same claim again: %v %v", res, err)
					}
					if err := n.DeleteClaim(made.ID); err != nil {
						t.Fatal(err)
					}
				}
			}
			n.mustUnpublish(r)
			if builds.Load() != 1 {
				t.Errorf("%d templates were built, of one disk", builds.Load())
			}
		})
	}
}

// mustBeDisk checks that a file of so many bytes begins with the disk of newDisks, and is empty after it.
func mustBeDisk(t *testing.T, path string, size int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	copy(want[diskBytes-len(diskWord):], diskWord)
	if !bytes.Equal(b, want) {
		t.Errorf("%s has %d bytes and other content than the disk", path, len(b))
	}
}

// TestDiskContentTooLarge asks for a volume that is smaller than the disk it is to begin with.
func TestDiskContentTooLarge(t *testing.T) {
	n, _ := newDisks(t, testenv.PoolKinds[0])
	r := n.request("small", "", 4<<20)
	r.Mode, r.Spec.Content = image.ModeDiskImage, "disk"
	_, err := n.PublishInline(t.Context(), r)
	if !errors.Is(err, diskfs.ErrOutOfRange) {
		t.Fatal(err)
	}
	const want = "the disk of content disk has 5Mi, and the volume 4Mi; ask for at least that"
	if !bytes.Contains([]byte(err.Error()), []byte(want)) {
		t.Errorf("%v does not say %s", err, want)
	}
	r.Spec.Content = "shops" // which the namespace default may not use
	if _, err := n.PublishInline(t.Context(), r); !errors.Is(err, errdefs.ErrNotFound) {
		t.Error(err)
	}
	n.mustUnpublish(r)
}
