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
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// lessThanMiB matches an error that says that less than 1 MiB of the pool is free.
var lessThanMiB = regexp.MustCompile(`, [0-9.]+(Ki| bytes) are free`)

// writeUntilFull writes and syncs files until one fails. It returns how many are safe.
func writeUntilFull(target string, from int) (synced int, err error) {
	for i := from; i < from+100000; i++ {
		if err := writeSynced(filepath.Join(target, numbered(i)), content(i)); err != nil {
			return i, err
		}
	}
	return from + 100000, nil
}

// thinClaims publishes a thin claim of each filesystem with some synced files in it. It returns
// how many are safe in each.
func (n *node) thinClaims(size int64) (thin []image.Record, synced map[string]int) {
	n.t.Helper()
	synced = map[string]int{}
	for _, fs := range diskfs.Names() {
		v := n.mustCreate(claim("thin-"+fs, fs, size))
		at := n.mustPublishClaim(v, "pod")
		for i := range 20 {
			if err := writeSynced(filepath.Join(at, numbered(i)), content(i)); err != nil {
				n.t.Fatal(err)
			}
		}
		synced[v.ID] = 20
		thin = append(thin, v)
	}
	return thin, synced
}

// TestFullThinPool fills a pool that has promised more than it has. New volumes are refused.
// Thin ones cannot write, but keep everything that they had synced. Thick ones are not
// affected.
func TestFullThinPool(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 2*gib, Config{Overcommit: 100, Headroom: size.Share{Percent: 5}})
			thin, synced := n.thinClaims(10 * gib)
			thickFS := n.mustCreate(ClaimRequest{Name: "thick-fs", Spec: diskfs.Spec{Filesystem: "ext4", Size: 64 * mib}, Mode: image.ModeFilesystem, Provisioning: image.Thick})
			thickDisk := n.mustCreate(ClaimRequest{Name: "thick-disk", Spec: diskfs.Spec{Filesystem: "raw", Size: 32 * mib}, Mode: image.ModeBlock, Provisioning: image.Thick})
			thickAt, diskAt := n.mustPublishClaim(thickFS, "pod"), n.mustPublishClaim(thickDisk, "pod")
			if h := n.PoolHealth(); len(h) > 0 {
				t.Errorf("not full yet: %v", h)
			}
			testenv.Fill(t, n.pool.Root())

			for _, r := range []ClaimRequest{claim("one-more", "ext4", 64*mib), {Name: "one-more-thick", Spec: diskfs.Spec{Filesystem: "raw", Size: mib}, Mode: image.ModeBlock, Provisioning: image.Thick}} {
				_, _, err := n.CreateClaim(t.Context(), r)
				t.Log(err)
				if !errors.Is(err, pool.ErrFull) || !lessThanMiB.MatchString(err.Error()) {
					t.Errorf("a claim on a full pool: %v", err)
				}
			}
			if _, err := n.CreateSnapshot(t.Context(), "one-more", thin[0].ID); !errors.Is(err, pool.ErrFull) {
				t.Errorf("a snapshot on a full pool: %v", err)
			}
			if _, err := n.PublishInline(t.Context(), n.request("one-more", "ext4", 64*mib)); !errors.Is(err, pool.ErrFull) {
				t.Errorf("an inline volume on a full pool: %v", err)
			}
			for _, thick := range []bool{false, true} {
				if left, err := n.Available(image.Provisioning(thick)); err != nil || left != 0 {
					t.Errorf("thick %v: Available returns %d bytes: %v", thick, left, err)
				}
			}
			if h := n.PoolHealth(); len(h) != 1 || h[0].Code != "PoolFull" {
				t.Errorf("health of the pool: %v", h)
			}
			// Thin volumes can write until they have used all the space that they took before.
			for _, v := range thin {
				safe, err := writeUntilFull(n.target(v.ID+"-pod"), synced[v.ID])
				t.Logf("%s: %d files are safe, then: %v", v.ID, safe, err)
				if err == nil {
					t.Errorf("%s: everything could be written", v.ID)
				}
				synced[v.ID] = safe
			}
			n.thickGoesOn(thickAt, diskAt)
			n.conditionsOf(thin)

			if err := os.Remove(filepath.Join(n.pool.Root(), "filler")); err != nil {
				t.Fatal(err)
			}
			if err := n.pool.Sync(); err != nil {
				t.Fatal(err)
			}
			for _, v := range thin {
				n.mustUnpublishClaim(v, "pod")
				n.mustUnstage(v.ID)
				testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
				at := n.mustPublishClaim(v, "pod")
				mustHold(t, v.ID, at, synced[v.ID])
				if err := writeSynced(filepath.Join(at, "afterwards"), content(0)); err != nil {
					t.Errorf("%s: with space again: %v", v.ID, err)
				}
				if h, err := n.Health(v.ID); err != nil || len(h) > 0 {
					t.Errorf("health %v: %v", h, err)
				}
				n.mustUnpublishClaim(v, "pod")
				n.mustUnstage(v.ID)
				testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
				testenv.Fsck(t, v.Spec.Filesystem, n.pool.Volume(v.ID))
				n.mustDelete(v.ID)
			}
			n.mustEnd(thickFS, "pod")
			n.mustEnd(thickDisk, "pod")
			again := n.mustCreate(claim("again", "ext4", 64*mib))
			n.mustDelete(again.ID)
		})
	}
}

// thickGoesOn writes thick volumes from end to end, twice, so that the second round
// overwrites data.
func (n *node) thickGoesOn(fsAt, diskAt string) {
	n.t.Helper()
	for round := range byte(2) {
		var st syscall.Statfs_t
		if err := syscall.Statfs(fsAt, &st); err != nil {
			n.t.Fatal(err)
		}
		data := bytes.Repeat([]byte{'a' + round}, 40*mib)
		if err := writeSynced(filepath.Join(fsAt, "all"), data); err != nil {
			n.t.Errorf("thick filesystem, round %d: %v", round, err)
		}
		f, err := os.OpenFile(diskAt, os.O_RDWR, 0)
		if err != nil {
			n.t.Fatal(err)
		}
		_, err = f.WriteAt(data[:32*mib], 0)
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			n.t.Errorf("thick disk, round %d: %v", round, err)
		}
		if b, err := os.ReadFile(filepath.Join(fsAt, "all")); err != nil || !bytes.Equal(b, data) {
			n.t.Errorf("thick filesystem, round %d, has something else: %v", round, err)
		}
	}
}

// conditionsOf checks the conditions of volumes on a full pool. The kernel may have shut
// down some of their filesystems.
func (n *node) conditionsOf(volumes []image.Record) {
	n.t.Helper()
	for _, v := range volumes {
		h, err := n.Health(v.ID)
		if err != nil {
			n.t.Error(err)
		}
		var reasons []string
		for _, c := range h {
			reasons = append(reasons, c.Code)
		}
		n.t.Logf("%s: %v", v.ID, reasons)
		if len(h) == 0 || reasons[len(reasons)-1] != "PoolFull" {
			n.t.Errorf("%s: %v", v.ID, h)
		}
	}
}

// TestPromises checks that claims can be made up to the available space, and not beyond.
func TestPromises(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNodeWith(t, kind, 4*gib, Config{Headroom: size.Share{Percent: 5}})
			for _, thick := range []bool{false, true} {
				left, err := n.Available(image.Provisioning(thick))
				if err != nil || left < 3*gib || left%mib != 0 {
					t.Fatalf("thick %v: %d MiB are available: %v", thick, left/mib, err)
				}
				r := disk("too-large", left+64*mib)
				r.Provisioning = image.Provisioning(thick)
				if _, _, err := n.CreateClaim(t.Context(), r); !errors.Is(err, pool.ErrFull) {
					t.Errorf("thick %v: a claim larger than the available space: %v", thick, err)
				}
				r = disk("fits", left)
				r.Provisioning = image.Provisioning(thick)
				v := n.mustCreate(r)
				if left, err := n.Available(image.Provisioning(thick)); err != nil || left > 64*mib {
					t.Errorf("thick %v: %d MiB are available afterwards: %v", thick, left/mib, err)
				}
				if _, _, err := n.CreateClaim(t.Context(), disk("one-more", 128*mib)); !errors.Is(err, pool.ErrFull) {
					t.Errorf("thick %v: one more: %v", thick, err)
				}
				n.mustDelete(v.ID)
			}
			// Many claims at once are promised no more than one after the other.
			var wg sync.WaitGroup
			var mu sync.Mutex
			var made []string
			for i := range 16 {
				wg.Go(func() {
					v, _, err := n.CreateClaim(t.Context(), disk(fmt.Sprintf("c-%d", i), gib))
					if err != nil && !errors.Is(err, pool.ErrFull) {
						t.Error(err)
					}
					if err == nil {
						mu.Lock()
						made = append(made, v.ID)
						mu.Unlock()
					}
				})
			}
			wg.Wait()
			t.Logf("%d of 16 claims of 1 GiB on a pool of 4 GiB", len(made))
			if len(made) > 3 {
				t.Errorf("%d GiB were promised", len(made))
			}
			n.mustDelete(made...)
		})
	}
}

// TestThickSnapshot checks that a thick volume keeps its own space when it is copied.
func TestThickSnapshot(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 2*gib)
			r := ClaimRequest{Name: "thick", Spec: diskfs.Spec{Filesystem: "ext4", Size: 256 * mib}, Mode: image.ModeFilesystem, Provisioning: image.Thick}
			v := n.mustCreate(r)
			at := n.mustPublishClaim(v, "pod")
			if err := writeSynced(filepath.Join(at, "all"), bytes.Repeat([]byte{'1'}, 150*mib)); err != nil {
				t.Fatal(err)
			}
			snap := n.mustSnapshot("of-thick", v.ID)
			r.Name, r.Source = "copy", image.Source{Snapshot: snap.ID}
			copied := n.mustCreate(r)
			copiedAt := n.mustPublishClaim(copied, "pod")
			thin := n.mustCreate(ClaimRequest{Name: "thin", Spec: r.Spec, Mode: r.Mode, Source: image.Source{Volume: v.ID}})
			// The device refuses discards, which would give space back.
			if out := n.trim(at); !strings.Contains(out, "not supported") {
				t.Errorf("fstrim: %s", out)
			}
			testenv.Fill(t, n.pool.Root())
			for where, dir := range map[string]string{"the volume": at, "its copy": copiedAt} {
				f, err := os.OpenFile(filepath.Join(dir, "all"), os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				_, err = f.WriteAt(bytes.Repeat([]byte{'2'}, 150*mib), 0)
				if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
					t.Errorf("overwriting snapshotted data in %s: %v", where, err)
				}
			}
			if err := os.Remove(filepath.Join(n.pool.Root(), "filler")); err != nil {
				t.Fatal(err)
			}
			testenv.Fsck(t, "ext4", n.pool.Volume(thin.ID))
			n.mustDelete(thin.ID)
			for _, v := range []image.Record{v, copied} {
				if h, err := n.Health(v.ID); err != nil || len(h) > 0 {
					t.Errorf("health %v: %v", h, err)
				}
				loops := n.loops(v.ID)
				n.mustEnd(v, "pod")
				for _, i := range loops {
					if _, err := os.Stat(fmt.Sprintf("/dev/loop%d", i)); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("/dev/loop%d refuses discards, and was left for other volumes: %v", i, err)
					}
				}
			}
			if err := n.DeleteSnapshot(snap.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestImpatient ends the caller's time while a thick volume is copied. The work goes on, and
// is done once.
func TestImpatient(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	r := disk("large", gib)
	r.Provisioning = image.Thick
	v := n.mustCreate(r)
	if err := writeSynced(n.mustPublishClaim(v, "pod"), bytes.Repeat([]byte{'x'}, 512*mib)); err != nil {
		t.Fatal(err)
	}
	hasty := func(what string, do func(context.Context) error) {
		t.Helper()
		tries := 0
		for err := errdefs.ErrUnderWay; errors.Is(err, errdefs.ErrUnderWay); tries++ {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
			if err = do(ctx); err != nil && !errors.Is(err, errdefs.ErrUnderWay) {
				t.Fatal(err)
			}
			cancel()
		}
		if tries < 2 {
			t.Errorf("%s: the first try succeeded, so this tested nothing", what)
		}
	}
	hasty("snapshot", func(ctx context.Context) error {
		_, err := n.CreateSnapshot(ctx, "s", v.ID)
		return err
	})
	r.Name, r.Source = "copy", image.Source{Snapshot: "s"}
	hasty("copy", func(ctx context.Context) error {
		_, _, err := n.CreateClaim(ctx, r)
		return err
	})
	// Work under way ends with its Manager, and leaves nothing.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	r.Name = "never"
	if _, _, err := n.CreateClaim(ctx, r); !errors.Is(err, errdefs.ErrUnderWay) {
		t.Errorf("another copy: %v", err)
	}
	if err := n.DeleteClaim("never"); !errors.Is(err, errdefs.ErrUnderWay) {
		t.Errorf("deleting a claim that is being made: %v", err)
	}
	n.work.cancel()
	n.work.wait.Wait()
	if _, err := n.GetClaim("never"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("after the end: %v", err)
	}
	n.mustEnd(v, "pod")
	n.mustDelete("copy")
	if err := n.DeleteSnapshot("s"); err != nil {
		t.Error(err)
	}
}

func (n *node) trim(at string) string {
	out, err := testenv.Try("fstrim", at)
	if err == nil {
		n.t.Errorf("fstrim succeeded: %s", out)
	}
	return out
}
