// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"io"
	"os"
	"path/filepath"
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
			noPartitions(t, at)
			n.mustEnd(v, "pod")
		})
	}
}

// noPartitions writes a partition table with sectors of 512 bytes, as cloud images have, to a device with larger ones.
// Who sees the device's own sectors, as a guest of KubeVirt with blockSize.matchVolume, finds no partitions.
func noPartitions(t *testing.T, device string) {
	t.Helper()
	image := filepath.Join(testenv.Dir(t), "gpt")
	testenv.Run(t, "truncate", "--size", "16M", image)
	testenv.Run(t, "sh", "-c", "echo 'size=1M' | sfdisk --quiet --label gpt "+image)
	testenv.Run(t, "dd", "if="+image, "of="+device, "bs=1M", "conv=fsync", "status=none")
	partitions := func(sector string) string {
		small := strings.TrimSpace(testenv.Run(t, "losetup", "--find", "--show", "--sector-size", sector, device))
		defer testenv.Run(t, "losetup", "--detach", small)
		out, _ := testenv.Try("partx", "--show", "--noheadings", "--output", "NR", small)
		return strings.TrimSpace(out)
	}
	if got := partitions("512"); got != "1" {
		t.Errorf("with sectors of 512 bytes the partitions are %q", got)
	}
	if got := partitions("4096"); got == "1" {
		t.Errorf("with sectors of 4096 bytes there are the partitions %q", got)
	}
}
