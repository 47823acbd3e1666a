// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// allocated is the space that a volume's image takes.
func (n *node) allocated(id string) int64 {
	n.t.Helper()
	img, err := n.images.Open(id)
	if err != nil {
		n.t.Fatal(err)
	}
	defer img.Close()
	a, err := img.Allocated()
	if err != nil {
		n.t.Fatal(err)
	}
	return a
}

func (n *node) mustTrim() {
	n.t.Helper()
	if err := n.Trim(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
}

// fillAndEmpty writes files of 200 MiB in all, and deletes them.
func fillAndEmpty(t testing.TB, at string) {
	t.Helper()
	block := bytes.Repeat([]byte("data"), 5<<20)
	for i := range 10 {
		if err := writeSynced(filepath.Join(at, numbered(i)), block); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		if err := os.Remove(filepath.Join(at, numbered(i))); err != nil {
			t.Fatal(err)
		}
	}
	testenv.Run(t, "sync", "-f", at)
}

// TestTrim deletes files in volumes. Their space is returned to the pool, but not that of
// thick volumes, and not while another operation works on the volume.
func TestTrim(t *testing.T) {
	everywhere(t, 2*gib, func(n *node, fs string) {
		t := n.t
		r := n.request("inline-"+fs, fs, 400*mib)
		n.mustPublish(r)
		claimed := n.mustCreate(claim("claim-"+fs, fs, 400*mib))
		at := n.mustPublishClaim(claimed, "pod")
		thick := n.mustCreate(ClaimRequest{Name: "thick-" + fs, Spec: diskfs.Spec{Filesystem: fs, Size: 400 * mib}, Mode: image.ModeFilesystem, Provisioning: image.Thick})
		thickAt := n.mustPublishClaim(thick, "pod")

		n.mustTrim() // what formatting left
		fresh := n.allocated(r.ID)
		for _, path := range []string{r.Target, at, thickAt} {
			fillAndEmpty(t, path)
		}
		if fs != "btrfs" { // which discards by itself
			if now := n.allocated(r.ID); now < fresh+190*mib {
				t.Errorf("the image took %s and takes %s: there is nothing to return", size.Format(fresh), size.Format(now))
			}
			unlock, err := n.locks.volume(r.ID)
			if err != nil {
				t.Fatal(err)
			}
			n.mustTrim()
			unlock()
			if now := n.allocated(r.ID); now < fresh+190*mib {
				t.Error("a volume was trimmed while another operation had it")
			}
		}
		testenv.Eventually(t, "the space to come back", func() bool {
			testenv.Run(t, "sync", "-f", r.Target)
			testenv.Run(t, "sync", "-f", at)
			n.mustTrim()
			return n.allocated(r.ID) < fresh+worthTrimming && n.allocated(claimed.ID) < fresh+worthTrimming
		})
		if now := n.allocated(thick.ID); now < 400*mib {
			t.Errorf("a thick volume has %s", size.Format(now))
		}
		n.mustUnpublish(r)
		n.mustEnd(claimed, "pod")
		n.mustEnd(thick, "pod")
		n.mustTrim()
		if len(n.trims.volumes) > 0 {
			t.Errorf("volumes that are gone are remembered: %v", n.trims.volumes)
		}
	})
}

// TestTrimSkips trims around volumes that cannot be trimmed: read-only, shut down, covered.
func TestTrimSkips(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	readOnly := n.request("read-only", "ext4", 64*mib)
	readOnly.Access = image.Access{ReadOnly: true}
	down := n.request("down", "xfs", 300*mib)
	covered := n.request("covered", "xfs", 300*mib)
	good := n.request("good", "ext4", 400*mib)
	for _, r := range []InlineRequest{readOnly, down, covered, good} {
		n.mustPublish(r)
	}
	n.mustTrim()
	fresh := n.allocated(good.ID)
	fillAndEmpty(t, good.Target)
	shutdown(t, down.Target)
	testenv.Run(t, "mount", "-t", "tmpfs", "cover", covered.Target)
	n.trims = trims{} // so that all are worth it
	n.mustTrim()
	testenv.Run(t, "umount", covered.Target)
	if now := n.allocated(good.ID); now > fresh+worthTrimming {
		t.Errorf("the image took %s and takes %s", size.Format(fresh), size.Format(now))
	}
	for _, r := range []InlineRequest{readOnly, down, covered, good} {
		n.mustUnpublish(r)
	}
}

// BenchmarkDeletedFiles deletes 20,000 small files and one of 300 MiB in a volume on a loopback
// pool, and syncs: mounted as the plugin mounts it, and with the option discard. Then it trims.
func BenchmarkDeletedFiles(b *testing.B) {
	p, err := pool.Open(b.Context(), pool.Config{Dir: filepath.Join(testenv.Ext4.Mount(b, 3*gib), "pool"), LoopbackSize: 3 * gib})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { testenv.Umount(b, p.Root()) })
	n := newNodeOn(b, p, Config{})
	for _, fs := range []string{"ext4", "xfs"} {
		for _, option := range []string{"nodiscard", "discard"} {
			b.Run(fs+"/"+option, func(b *testing.B) {
				n := n.with(b)
				n.trims = trims{}
				r := n.request("volume", fs, gib)
				n.mustPublish(r)
				// xfs takes the option only with the first mount.
				dev := findmnt(b, "SOURCE", r.Target)
				f, err := os.Open(dev)
				if err != nil {
					b.Fatal(err)
				}
				testenv.Run(b, "umount", r.Target)
				testenv.Run(b, "mount", "-o", option, dev, r.Target)
				f.Close()
				var trimming time.Duration
				for range b.N {
					b.StopTimer()
					fillForBenchmark(b, r.Target)
					b.StartTimer()
					if err := os.RemoveAll(filepath.Join(r.Target, "files")); err != nil {
						b.Fatal(err)
					}
					testenv.Run(b, "sync", "-f", r.Target)
					b.StopTimer()
					start := time.Now()
					n.mustTrim()
					trimming += time.Since(start)
				}
				b.ReportMetric(float64(trimming.Milliseconds())/float64(b.N), "trim-ms/op")
				n.mustUnpublish(r)
			})
		}
	}
}

func fillForBenchmark(b *testing.B, at string) {
	b.Helper()
	for d := range 40 {
		dir := filepath.Join(at, "files", numbered(d))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		for i := range 500 {
			if err := os.WriteFile(filepath.Join(dir, numbered(i)), make([]byte, 16<<10), 0o600); err != nil {
				b.Fatal(err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(at, "files", "large"), bytes.Repeat([]byte("data"), 75<<20), 0o600); err != nil {
		b.Fatal(err)
	}
	testenv.Run(b, "sync", "-f", at)
}
