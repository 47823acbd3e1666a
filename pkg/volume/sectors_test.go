// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
)

// TestSectors shows what docs/claims.md says about the sectors of block volumes.
func TestSectors(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			v := n.mustCreate(disk("disk", 320*mib))
			at := n.mustPublishClaim(v, "pod")
			if sectors := strings.Fields(testenv.Run(t, "blockdev", "--getss", "--getpbsz", at)); sectors[0] != "4096" || sectors[1] != "4096" {
				t.Errorf("its sectors have %s bytes, want 4096", sectors)
			}
			for name, mkfs := range map[string][]string{
				"xfs with sectors of 512 bytes": {"mkfs.xfs", "-q", "-s", "size=512"},
				"ext4 with blocks of 1 KiB":     {"mkfs.ext4", "-q", "-b", "1024"},
			} {
				image, err := os.Open(testenv.Image(t, 310*mib, mkfs...))
				if err != nil {
					t.Fatal(err)
				}
				device, err := os.OpenFile(at, os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(device, image); err != nil {
					t.Fatal(err)
				}
				if err := device.Sync(); err != nil {
					t.Fatal(err)
				}
				device.Close()
				image.Close()
				dir := testenv.Dir(t)
				if out, err := testenv.Try("mount", at, dir); err == nil {
					t.Errorf("an image of an %s can be mounted from it", name)
					testenv.Run(t, "umount", dir)
				} else {
					t.Log(out)
				}
				small := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", "--sector-size", "512", at))
				if out, err := testenv.Try("mount", small, dir); err != nil {
					t.Errorf("an image of an %s cannot be mounted through losetup: %s", name, out)
				} else {
					testenv.Run(t, "umount", dir)
				}
				testenv.Run(t, "losetup", "--detach", small)
			}
			n.mustEnd(v, "pod")
		})
	}
}
