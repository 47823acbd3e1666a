// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestHealth makes each condition happen and reads it. The volume can be unpublished and
// deleted all the same.
func TestHealth(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	ext4, xfs, block := claim("", "ext4", 64*mib), claim("", "xfs", 300*mib), disk("", 8*mib)
	thick := ClaimRequest{Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeBlock, Provisioning: image.Thick}
	diskImage := ClaimRequest{Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage}
	for name, c := range map[string]struct {
		request  ClaimRequest
		harm     func(v image.Record, target string) error
		reason   string
		severity health.Severity
	}{
		"nothing": {request: ext4, harm: func(image.Record, string) error { return nil }},
		"xfs shut down": {request: xfs, reason: "FilesystemShutDown", severity: health.Inaccessible,
			harm: func(_ image.Record, at string) error {
				testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", at)
				return nil
			}},
		"ext4 shut down": {request: ext4, reason: "FilesystemShutDown", severity: health.Inaccessible,
			harm: func(_ image.Record, at string) error {
				testenv.Run(t, "xfs_io", "-x", "-c", "shutdown", at)
				return nil
			}},
		"ext4 read-only": {request: ext4, reason: "FilesystemReadOnly", severity: health.Inaccessible,
			harm: func(_ image.Record, at string) error {
				return syscall.Mount("", at, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
			}},
		"buffered": {request: block, reason: "DirectIOLost", severity: health.Degraded,
			harm: func(v image.Record, _ string) error {
				testenv.Run(t, "losetup", "--direct-io=off", fmt.Sprintf("/dev/loop%d", n.loops(v.ID)[0]))
				return nil
			}},
		"filesystem without an image": {request: ext4, reason: "BackingImageMissing", severity: health.DataLoss,
			harm: func(v image.Record, _ string) error { return os.Remove(n.pool.Volume(v.ID)) }},
		"block without an image": {request: block, reason: "BackingImageMissing", severity: health.DataLoss,
			harm: func(v image.Record, _ string) error { return os.Remove(n.pool.Volume(v.ID)) }},
		"an image that is too short": {request: block, reason: "BackingImageTruncated", severity: health.DataLoss,
			harm: func(v image.Record, _ string) error { return os.Truncate(n.pool.Volume(v.ID), mib) }},
		"a small disk image": {request: diskImage, reason: "DiskImageShortened", severity: health.Degraded,
			harm: func(_ image.Record, at string) error { return os.Truncate(filepath.Join(at, image.DiskName), mib) }},
		"an empty disk image": {request: diskImage, reason: "DiskImageEmptied", severity: health.DataLoss,
			harm: func(_ image.Record, at string) error { return os.Truncate(filepath.Join(at, image.DiskName), 0) }},
		"a disk image of one page": {request: diskImage, reason: "DiskImageEmptied", severity: health.DataLoss,
			harm: func(_ image.Record, at string) error { return os.Truncate(filepath.Join(at, image.DiskName), 4096) }},
		"a large disk image": {request: diskImage, reason: "DiskImageGrown", severity: health.Degraded,
			harm: func(_ image.Record, at string) error {
				return os.Truncate(filepath.Join(at, image.DiskName), 50*gib)
			}},
		"a disk image with one byte more": {request: diskImage, reason: "DiskImageGrown", severity: health.Degraded,
			harm: func(_ image.Record, at string) error {
				return os.Truncate(filepath.Join(at, image.DiskName), 8*mib+1)
			}},
		"space behind the end of a disk image": {request: diskImage, reason: "DiskImageGrown", severity: health.Degraded,
			harm: func(v image.Record, at string) error {
				f, err := os.OpenFile(filepath.Join(at, image.DiskName), os.O_RDWR, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				return syscall.Fallocate(int(f.Fd()), 1 /* KEEP_SIZE */, 8*mib, 100*mib)
			}},
		"holes in thick space": {request: thick, reason: "ReservationIncomplete", severity: health.Degraded,
			harm: func(v image.Record, _ string) error {
				f, err := os.OpenFile(n.pool.Volume(v.ID), os.O_RDWR, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				return syscall.Fallocate(int(f.Fd()), 0x3 /* PUNCH_HOLE|KEEP_SIZE */, mib, mib)
			}},
	} {
		t.Run(name, func(t *testing.T) {
			n := n.with(t)
			r := c.request
			r.Name = strings.ReplaceAll(name, " ", "-")
			v := n.mustCreate(r)
			at := n.mustPublishClaim(v, "pod")
			if h, err := n.Health(v.ID, at); err != nil || len(h) > 0 {
				t.Fatalf("a healthy volume: %v %v", h, err)
			}
			if err := c.harm(v, at); err != nil {
				t.Fatal(err)
			}
			h, err := n.Health(v.ID, "/elsewhere", at, n.staging(v.ID))
			t.Log(h, err)
			switch {
			case err != nil:
				t.Error(err)
			case c.reason == "" && len(h) == 0:
			case len(h) != 1 || h[0].Code != c.reason || h[0].Severity != c.severity || !strings.Contains(h[0].Message(), v.ID):
				t.Errorf("the conditions are %v", h)
			}
			if c.reason == "ReservationIncomplete" {
				if _, err := n.Stats(v.ID, at); err != nil {
					t.Error(err)
				}
				if h, err := n.Health(v.ID, at); err != nil || len(h) > 0 {
					t.Errorf("after it was measured: %v %v", h, err)
				}
			}
			n.mustUnpublishClaim(v, "pod")
			n.mustUnstage(v.ID)
			n.mustDelete(v.ID)
		})
	}
	if _, err := n.Health("unknown", n.target("unknown")); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("an unknown volume: %v", err)
	}
}

// TestPoolHealth remounts the pool read-only.
func TestPoolHealth(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	if h := n.PoolHealth(); len(h) > 0 {
		t.Errorf("a healthy pool: %v", h)
	}
	at := filepath.Dir(n.pool.Root())
	testenv.Run(t, "mount", "-o", "remount,ro", at)
	h := n.PoolHealth()
	t.Log(h)
	if len(h) != 1 || h[0].Code != "PoolUnusable" || h[0].Severity != health.Inaccessible {
		t.Errorf("a read-only pool: %v", h)
	}
	testenv.Run(t, "mount", "-o", "remount,rw", at)
}
