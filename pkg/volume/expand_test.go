// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestExpand grows filesystems of 1 GiB to 2 and 20 GiB while they are mounted. Where that is
// not permitted, the error says so, and they grow when they are staged again.
func TestExpand(t *testing.T) { everywhere(t, 80*gib, (*node).expandFilesystem) }

func (n *node) expandFilesystem(fs string) {
	t := n.t
	v := n.mustCreate(claim("grows-"+fs, fs, gib))
	at := n.mustPublishClaim(v, "pod")
	synced, stop := load(t, at)
	for _, size := range []int64{2 * gib, 20 * gib} {
		if now, mode, err := n.Expand(v.ID, Size{Required: size}, nil); err != nil || now != size || mode != image.ModeFilesystem {
			t.Fatalf("%d bytes: %v", now, err)
		}
		now, err := n.ExpandOnNode(v.ID, at, Size{Required: size}, nil)
		if may := fsctl.MayGrow(fs); may != nil {
			t.Log(err)
			if !errors.Is(err, errdefs.ErrState) || !errors.Is(err, fsctl.ErrNotPermitted) || !strings.Contains(err.Error(), "staged the next time") {
				t.Errorf("growing where it is not permitted: %v", err)
			}
			stop()
			n.mustUnpublishClaim(v, "pod")
			n.mustUnstage(v.ID)
			n.mustPublishClaim(v, "pod")
			mustHold(t, fmt.Sprintf("of %d bytes", size), at, synced())
		} else if err != nil || now != size {
			t.Fatalf("on the node, %d bytes: %v", now, err)
		}
		if now, err := n.ExpandOnNode(v.ID, n.staging(v.ID), Size{Required: size}, &Use{}); err != nil || now != size {
			t.Errorf("once more, at the staging path: %d bytes: %v", now, err)
		}
		if u, err := n.Stats(v.ID, at); err != nil || u.TotalBytes < size*9/10 || u.TotalBytes > size {
			t.Errorf("%d bytes of %d: %v", u.TotalBytes, size, err)
		}
	}
	stop()
	mustHold(t, "grown", at, synced())
	if synced() == 0 {
		t.Error("nothing was written meanwhile")
	}
	n.mustUnpublishClaim(v, "pod")
	n.mustUnstage(v.ID)
	testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
	testenv.Fsck(t, fs, n.pool.Volume(v.ID))
	n.mustDelete(v.ID)
}

// TestExpandUnstaged expands volumes that are not in use. Their filesystems grow when they
// are staged.
func TestExpandUnstaged(t *testing.T) {
	n := newNode(t, testenv.XFS, 8*gib)
	for _, fs := range diskfs.Names() {
		v := n.mustCreate(claim("later-"+fs, fs, 300*mib))
		if err := writeSynced(filepath.Join(n.mustStage(v), numbered(0)), content(0)); err != nil {
			t.Error(err)
		}
		n.mustUnstage(v.ID)
		if _, _, err := n.Expand(v.ID, Size{Required: gib}, nil); err != nil {
			t.Fatal(err)
		}
		at := n.mustStage(v)
		mustHold(t, fs, at, 1)
		if u, err := n.Stats(v.ID, at); err != nil || u.TotalBytes < gib*8/10 {
			t.Errorf("%s: %d bytes: %v", fs, u.TotalBytes, err)
		}
		n.mustEnd(v)
	}
}

// TestGrowingIsKilled kills the tools that grow an unmounted filesystem. The image must be
// as it was before.
func TestGrowingIsKilled(t *testing.T) {
	n := newNode(t, testenv.XFS, 40*gib)
	v := n.mustCreate(claim("killed", "ext4", 64*mib))
	if err := writeSynced(filepath.Join(n.mustStage(v), numbered(0)), content(0)); err != nil {
		t.Error(err)
	}
	n.mustUnstage(v.ID)
	if _, _, err := n.Expand(v.ID, Size{Required: 30 * gib}, nil); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(n.pool.Volume(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 { // growing takes some 60 ms: kill it at any time in between
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*2*time.Millisecond)
		if err := n.growth.onCopy(ctx, v.ID); err == nil {
			t.Logf("it had grown within %d ms", 2*i)
			cancel()
			break
		}
		cancel()
		testenv.Fsck(t, "ext4", n.pool.Volume(v.ID))
		if now, err := os.Stat(n.pool.Volume(v.ID)); err != nil || !os.SameFile(now, before) || !now.ModTime().Equal(before.ModTime()) {
			t.Errorf("the image was touched: %v", err)
		}
	}
	at := n.mustStage(v)
	mustHold(t, "killed", at, 1)
	if u, err := n.Stats(v.ID, at); err != nil || u.TotalBytes < 25*gib {
		t.Errorf("the filesystem has %d bytes: %v", u.TotalBytes, err)
	}
	n.mustEnd(v)
}

// TestGrowingIsAlone checks that an image is neither deleted nor expanded while a process
// grows a copy of it.
func TestGrowingIsAlone(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("grows", "ext4", 64*mib))
	img, err := n.images.Open(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	unlock, err := n.images.Exclusive(t.Context(), img, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.DeleteClaim(v.ID); !errors.Is(err, errdefs.ErrUnderWay) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deleting it: %v", err)
	}
	if _, _, err := n.Expand(v.ID, Size{Required: 128 * mib}, nil); !errors.Is(err, errdefs.ErrUnderWay) {
		t.Errorf("expanding it: %v", err)
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := n.Expand(v.ID, Size{Required: 128 * mib}, nil); err != nil {
		t.Error(err)
	}
	if _, err := n.images.Exclusive(t.Context(), img, time.Second); !errors.Is(err, errdefs.ErrUnderWay) {
		t.Errorf("locking an image that was opened before it was expanded: %v", err)
	}
	img.Close()
	n.mustDelete(v.ID)
}

func TestExpandDisks(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			for name, r := range map[string]ClaimRequest{
				"block":       disk("block", 8*mib),
				"thick-block": {Name: "thick-block", Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeBlock, Provisioning: image.Thick},
				"image":       {Name: "image", Spec: diskfs.Spec{Filesystem: "raw", Size: 8 * mib}, Mode: image.ModeDiskImage},
			} {
				v := n.mustCreate(r)
				at := n.mustPublishClaim(v, "pod")
				f := openDisk(t, at, v.Mode, os.O_RDWR)
				if _, err := f.WriteAt([]byte("kept"), 8*mib-4); err != nil {
					t.Error(err)
				}
				if err := f.Sync(); err != nil {
					t.Error(err)
				}
				if now, _, err := n.Expand(v.ID, Size{Required: 64*mib - 1}, nil); err != nil || now != 64*mib {
					t.Errorf("%s: %d bytes: %v", name, now, err)
				}
				if now, err := n.ExpandOnNode(v.ID, at, Size{}, &Use{Block: v.Mode == image.ModeBlock}); err != nil || now != 64*mib {
					t.Errorf("%s: on the node, %d bytes: %v", name, now, err)
				}
				f.Close()
				if b := readAll(t, f.Name()); len(b) != 64*mib || !bytes.Equal(b[8*mib-4:8*mib], []byte("kept")) {
					t.Errorf("%s: the pod sees %d bytes", name, len(b))
				}
				if v.Mode == image.ModeBlock { // kubelet may ask with the staging path
					if _, err := n.ExpandOnNode(v.ID, n.staging(v.ID), Size{}, nil); err != nil {
						t.Error(err)
					}
				}
				n.mustEnd(v, "pod")
			}
		})
	}
}

func TestExpandRefused(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	v := n.mustCreate(claim("kept", "ext4", 64*mib))
	at := n.mustPublishClaim(v, "pod")
	other := n.mustCreate(claim("other", "ext4", 64*mib))
	otherAt := n.mustPublishClaim(other, "pod")
	for name, c := range map[string]struct {
		id   string
		want Size
		err  error
	}{
		"shrinking":      {v.ID, Size{Required: mib, Limit: 63 * mib}, diskfs.ErrOutOfRange},
		"beyond ext4":    {v.ID, Size{Required: 9 << 40}, diskfs.ErrOutOfRange},
		"beyond int64":   {v.ID, Size{Required: 1<<63 - 1}, diskfs.ErrOutOfRange},
		"over the limit": {v.ID, Size{Required: 64*mib + 1, Limit: 64*mib + 2}, diskfs.ErrOutOfRange},
		"over the pool":  {v.ID, Size{Required: 5 * gib}, pool.ErrFull},
		"unknown":        {"unknown", Size{Required: gib}, errdefs.ErrNotFound},
	} {
		_, _, err := n.Expand(c.id, c.want, nil)
		t.Logf("%s: %v", name, err)
		if !errors.Is(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, c := range map[string]struct {
		path string
		use  *Use
		err  error
	}{
		"another's path": {otherAt, nil, errdefs.ErrNotFound},
		"no path":        {"some/path", nil, errdefs.ErrNotFound},
		"not there":      {n.target("elsewhere"), nil, errdefs.ErrNotFound},
		"as a device":    {at, &Use{Block: true}, errdefs.ErrInvalid},
	} {
		if _, err := n.ExpandOnNode(v.ID, c.path, Size{}, c.use); !errors.Is(err, c.err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if now, _, err := n.Expand(v.ID, Size{Required: mib}, nil); err != nil || now != 64*mib {
		t.Errorf("asked for less: %d bytes: %v", now, err)
	}
	if got, err := n.GetClaim(v.ID); err != nil || got.Spec.Size != 64*mib {
		t.Errorf("it has %d bytes: %v", got.Spec.Size, err)
	}
	n.mustEnd(v, "pod")
	n.mustEnd(other, "pod")
}

// expansions are the sizes that the benchmarks expand to, in GiB.
var expansions = []struct{ from, to int64 }{{1, 2}, {2, 20}}

// BenchmarkExpand grows a mounted filesystem. Where ext4 may not grow while it is mounted,
// it measures the staging that grows it.
func BenchmarkExpand(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, fs := range diskfs.Names() {
			n := newNode(b, kind, 80*gib)
			for _, e := range expansions {
				b.Run(fmt.Sprintf("%s-pool/%s/%d-to-%dGiB", kind.Name, fs, e.from, e.to), func(b *testing.B) {
					n := n.with(b)
					for b.Loop() {
						b.StopTimer()
						v := n.mustCreate(claim("bench", fs, e.from*gib))
						at := n.mustPublishClaim(v, "pod")
						staged := fsctl.MayGrow(fs) != nil
						if staged {
							n.mustUnpublishClaim(v, "pod")
							n.mustUnstage(v.ID)
						}
						b.StartTimer()
						if _, _, err := n.Expand(v.ID, Size{Required: e.to * gib}, nil); err != nil {
							b.Fatal(err)
						}
						if staged {
							n.mustPublishClaim(v, "pod")
						} else if _, err := n.ExpandOnNode(v.ID, at, Size{}, nil); err != nil {
							b.Fatal(err)
						}
						b.StopTimer()
						n.mustEnd(v, "pod")
						b.StartTimer()
					}
				})
			}
		}
	}
}

// BenchmarkExpandSpawned does the same with truncate(1), losetup(8) and the
// filesystem's own tool.
func BenchmarkExpandSpawned(b *testing.B) {
	for _, kind := range testenv.PoolKinds {
		for _, name := range diskfs.Names() {
			fs, err := diskfs.Lookup(name)
			if err != nil {
				b.Fatal(err)
			}
			dir := kind.Mount(b, 80*gib)
			for _, e := range expansions {
				b.Run(fmt.Sprintf("%s-pool/%s/%d-to-%dGiB", kind.Name, name, e.from, e.to), func(b *testing.B) {
					image, at := filepath.Join(dir, "image"), testenv.Dir(b)
					mount := func() string {
						testenv.Run(b, "mount", "-o", "loop", image, at)
						return strings.TrimSpace(testenv.Run(b, "findmnt", "-n", "-o", "SOURCE", at))
					}
					for b.Loop() {
						b.StopTimer()
						if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, e.from*gib)); err != nil {
							b.Fatal(err)
						}
						testenv.Run(b, fs.Mkfs, fs.MkfsArgs(image, "", nil)...)
						device := mount()
						offline := fsctl.MayGrow(name) != nil
						if offline {
							testenv.Umount(b, at)
						}
						b.StartTimer()
						testenv.Run(b, "truncate", "-s", fmt.Sprintf("%dG", e.to), image)
						if !offline {
							testenv.Run(b, "losetup", "-c", device)
						}
						switch {
						case offline:
							testenv.Run(b, "e2fsck", "-fp", image)
							testenv.Run(b, "resize2fs", image)
							mount()
						case name == "xfs":
							testenv.Run(b, "xfs_growfs", at)
						case name == "btrfs":
							testenv.Run(b, "btrfs", "filesystem", "resize", "max", at)
						default:
							testenv.Run(b, "resize2fs", device)
						}
						b.StopTimer()
						testenv.Run(b, "umount", at)
						if err := os.Remove(image); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
				})
			}
		}
	}
}
