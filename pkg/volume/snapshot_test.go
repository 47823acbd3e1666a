// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// load writes to a volume like a busy pod, until stop is called. It syncs and counts one file
// after the other, and between them writes much that it does not sync.
func load(t testing.TB, target string) (synced func() int, stop func()) {
	var count atomic.Int64
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; !done.Load() && i < 20000; i++ {
			// The files that are not counted are overwritten in a ring, so that they do not
			// fill the volume.
			name := filepath.Join(target, fmt.Sprintf("ring-%d", i%16))
			if err := os.WriteFile(name, bytes.Repeat([]byte{byte(i)}, 64<<10), 0o600); err != nil {
				t.Errorf("load: %v", err)
				return
			}
			if i%4 == 0 {
				if err := writeSynced(filepath.Join(target, numbered(i/4)), content(i/4)); err != nil {
					t.Errorf("load: %v", err)
					return
				}
				count.Store(int64(i/4 + 1))
			}
		}
	})
	return func() int { return int(count.Load()) }, func() {
		done.Store(true)
		wg.Wait()
	}
}

func numbered(i int) string { return fmt.Sprintf("file-%d", i) }

func content(i int) []byte {
	return bytes.Repeat(fmt.Appendf(nil, "%08d", i), 512+i%7)
}

func writeSynced(path string, b []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// mustHold checks that a mounted volume has the files that were synced.
func mustHold(t testing.TB, what, target string, files int) {
	t.Helper()
	for i := range files {
		if b, err := os.ReadFile(filepath.Join(target, numbered(i))); err != nil || !bytes.Equal(b, content(i)) {
			t.Errorf("%s: file %d of %d has %d bytes with the wrong content: %v", what, i, files, len(b), err)
			return
		}
	}
}

func from(name string, v image.Record, s image.Source) ClaimRequest {
	return ClaimRequest{Name: name, Spec: v.Spec, Mode: v.Mode, Source: s}
}

// TestSnapshots takes a snapshot of a filesystem under load, makes volumes from it and from
// each other, and mounts all of them at once. Then it deletes parent, snapshot and template,
// in every order.
func TestSnapshots(t *testing.T) { everywhere(t, 12*gib, (*node).snapshots) }

func (n *node) snapshots(fs string) {
	t := n.t
	parent := n.mustCreate(claim("parent-"+fs, fs, 300*mib))
	target := n.mustPublishClaim(parent, "pod")
	synced, stop := load(t, target)
	testenv.Eventually(t, "some load", func() bool { return synced() >= 10 })

	before := synced()
	start := time.Now()
	snap := n.mustSnapshot("snapshot-"+fs, parent.ID)
	t.Logf("a snapshot under load took %s", time.Since(start).Round(time.Microsecond))
	if again := n.mustSnapshot("snapshot-"+fs, parent.ID); again.UUID != snap.UUID {
		t.Error("a repeated call made the snapshot again")
	}
	restored := n.mustCreate(from("restored-"+fs, parent, image.Source{Snapshot: snap.ID}))
	restoredAt := n.mustPublishClaim(restored, "pod")
	mustHold(t, "restored", restoredAt, before)
	clone := n.mustCreate(from("clone-"+fs, parent, image.Source{Volume: restored.ID}))
	beforeLive := synced()
	live := n.mustCreate(from("live-"+fs, parent, image.Source{Volume: parent.ID}))
	stop()

	uuids := map[string]string{snap.UUID.String(): "the snapshot"}
	for _, v := range []struct {
		image.Record
		files int
	}{{parent, synced()}, {restored, before}, {clone, before}, {live, beforeLive}} {
		at := n.mustPublishClaim(v.Record, "pod")
		mustHold(t, v.ID, at, v.files)
		uuid := findmnt(t, "UUID", at)
		if uuids[uuid] != "" || uuid != v.UUID.String() {
			t.Errorf("%s has the UUID %s, its record has %s, and %q has the same", v.ID, uuid, v.UUID, uuids[uuid])
		}
		uuids[uuid] = v.ID
	}
	if before < 10 || len(uuids) != 5 {
		t.Errorf("%d files, %d UUIDs", before, len(uuids))
	}
	testenv.Fsck(t, fs, n.pool.Snapshot(snap.ID))
	for _, v := range []image.Record{restored, clone, live} {
		n.mustUnpublishClaim(v, "pod")
		n.mustUnstage(v.ID)
		testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
		testenv.Fsck(t, fs, n.pool.Volume(v.ID))
	}
	n.mustUnpublishClaim(parent, "pod")
	n.mustUnstage(parent.ID)
	n.everyOrder(parent, snap, before)
	n.mustDelete(restored.ID, clone.ID, live.ID)
}

// everyOrder deletes a volume, its snapshot and its template in each of the six orders, and
// checks that copies are not affected. Afterwards the template is there again, and the
// volume and the snapshot are deleted.
func (n *node) everyOrder(parent image.Record, snap image.SnapshotRecord, files int) {
	t := n.t
	template := n.pool.Template(parent.Template)
	// On btrfs a directory inherits from its parent that its files are not copy-on-write.
	dir := n.pool.Template("saved-by-the-test")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	saved := filepath.Join(dir, "template")
	// Keep copies, and not links, so that the deleted inodes are gone for good.
	keep := func(src, dst string) { testenv.Run(t, "cp", "--reflink=always", "--preserve=all", src, dst) }
	keep(template, saved)
	keep(n.pool.Volume(parent.ID), saved+"-volume")
	keep(n.pool.Snapshot(snap.ID), saved+"-snapshot")
	deletions := map[string]func() error{
		"parent":   func() error { return n.DeleteClaim(parent.ID) },
		"snapshot": func() error { return n.DeleteSnapshot(snap.ID) },
		"template": func() error { return os.Remove(template) },
	}
	for _, order := range [][]string{
		{"parent", "snapshot", "template"}, {"parent", "template", "snapshot"},
		{"snapshot", "parent", "template"}, {"snapshot", "template", "parent"},
		{"template", "parent", "snapshot"}, {"template", "snapshot", "parent"},
	} {
		name := strings.Join(order, "-")
		clones := []image.Record{
			n.mustCreate(from(parent.ID+"-"+name+"-r", parent, image.Source{Snapshot: snap.ID})),
			n.mustCreate(from(parent.ID+"-"+name+"-c", parent, image.Source{Volume: parent.ID})),
		}
		for _, what := range order {
			if err := deletions[what](); err != nil {
				t.Errorf("%s: deleting the %s: %v", name, what, err)
			}
			for _, v := range clones {
				mustHold(t, name+": without "+what, n.mustPublishClaim(v, "pod"), files)
				n.mustUnpublishClaim(v, "pod")
				n.mustUnstage(v.ID)
			}
		}
		for _, v := range clones {
			testenv.Eventually(t, "its device to go", func() bool { return len(n.loops(v.ID)) == 0 })
			testenv.Fsck(t, v.Spec.Filesystem, n.pool.Volume(v.ID))
			n.mustDelete(v.ID)
		}
		keep(saved, template)
		keep(saved+"-volume", n.pool.Volume(parent.ID))
		keep(saved+"-snapshot", n.pool.Snapshot(snap.ID))
	}
	n.mustDelete(parent.ID)
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		t.Error(err)
	}
}

// TestSnapshotsOfDisks checks that block volumes and disk images are copied to the last byte,
// attached or not.
func TestSnapshotsOfDisks(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			for name, r := range map[string]ClaimRequest{
				"block": disk("block", 8*mib),
				"image": {Name: "image", Spec: diskfs.Spec{Filesystem: "ext4", Size: 16 * mib}, Mode: image.ModeDiskImage},
			} {
				v := n.mustCreate(r)
				target := n.mustPublishClaim(v, "pod")
				f := openDisk(t, target, v.Mode, os.O_RDWR)
				if _, err := f.WriteAt([]byte("written, not synced"), 5*mib); err != nil {
					t.Error(err)
				}
				snap := n.mustSnapshot(name+"-snapshot", v.ID)
				want := readAll(t, f.Name())
				if _, err := f.WriteAt([]byte("afterwards"), 5*mib); err != nil {
					t.Error(err)
				}
				f.Close()
				// A disk may become a disk image, and the other way round.
				for _, mode := range []image.Mode{image.ModeBlock, image.ModeDiskImage} {
					r := from(fmt.Sprintf("%s-as-%s", name, mode), v, image.Source{Snapshot: snap.ID})
					r.Mode = mode
					copied := n.mustCreate(r)
					at := n.mustPublishClaim(copied, "pod")
					if mode == image.ModeDiskImage {
						at = filepath.Join(at, image.DiskName)
					}
					if !bytes.Equal(readAll(t, at), want) {
						t.Errorf("%s restored as %s is different", name, mode)
					}
					n.mustEnd(copied, "pod")
				}
				n.mustEnd(v, "pod")
				if err := n.DeleteSnapshot(snap.ID); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestRestoreLarger makes larger volumes from a snapshot. The filesystem grows when it is
// mounted for the first time.
func TestRestoreLarger(t *testing.T) {
	n := newNode(t, testenv.XFS, 12*gib)
	for _, fs := range diskfs.Names() {
		t.Run(fs, func(t *testing.T) {
			n := n.with(t)
			v := n.mustCreate(claim("small-"+fs, fs, 300*mib))
			if err := writeSynced(filepath.Join(n.mustStage(v), numbered(0)), content(0)); err != nil {
				t.Error(err)
			}
			snap := n.mustSnapshot("small-"+fs, v.ID)
			r := from("large-"+fs, v, image.Source{Snapshot: snap.ID})
			r.Spec.Size = 2 * gib
			large := n.mustCreate(r)
			at := n.mustPublishClaim(large, "pod")
			mustHold(t, "restored", at, 1)
			if u, err := n.Stats(large.ID, at); err != nil || u.TotalBytes < 17*gib/10 {
				t.Errorf("the filesystem has %d bytes: %v", u.TotalBytes, err)
			}
			n.mustEnd(large, "pod")
			// It grows even if it is staged read-only.
			r.Name = "large-read-only-" + fs
			large = n.mustCreate(r)
			ro := n.publishRequest(large, "pod")
			ro.ReadOnly = true
			if err := n.PublishClaim(t.Context(), ro); err != nil {
				t.Fatal(err)
			}
			mustHold(t, "restored read-only", ro.Target, 1)
			if u, err := n.Stats(large.ID, ro.Target); err != nil || u.TotalBytes < 17*gib/10 {
				t.Errorf("staged read-only, the filesystem has %d bytes: %v", u.TotalBytes, err)
			}
			if err := os.WriteFile(filepath.Join(ro.Target, "x"), nil, 0o600); !errors.Is(err, syscall.EROFS) {
				t.Errorf("writing to it: %v", err)
			}
			if fsctl.MayGrow(fs) == nil { // it also grows through a read-only target
				if now, err := n.ExpandOnNode(large.ID, ro.Target, Size{Required: 3 * gib}, nil); err != nil || now != 3*gib {
					t.Errorf("growing it read-only: %d bytes: %v", now, err)
				}
			}
			n.mustEnd(large, "pod")
			n.mustEnd(v)
			if err := n.DeleteSnapshot(snap.ID); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestBadSources asks for copies that cannot be made.
func TestBadSources(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	v := n.mustCreate(claim("source", "ext4", 64*mib))
	d := n.mustCreate(disk("disk", 8*mib))
	snap := n.mustSnapshot("snapshot", v.ID)
	inline := n.request("inline", "ext4", 64*mib)
	n.mustPublish(inline)
	for name, c := range map[string]struct {
		change func(*ClaimRequest)
		want   error
	}{
		"no such snapshot": {func(r *ClaimRequest) { r.Source.Snapshot = "none" }, errdefs.ErrNotFound},
		"no snapshot id":   {func(r *ClaimRequest) { r.Source.Snapshot = "../volumes/source" }, errdefs.ErrNotFound},
		"no such volume":   {func(r *ClaimRequest) { r.Source = image.Source{Volume: "none"} }, errdefs.ErrNotFound},
		"an inline volume": {func(r *ClaimRequest) { r.Source = image.Source{Volume: "inline"} }, errdefs.ErrNotFound},
		"smaller":          {func(r *ClaimRequest) { r.Spec.Size = 63 * mib }, diskfs.ErrOutOfRange},
		"limited":          {func(r *ClaimRequest) { r.Spec.Size, r.Limit = 0, 63*mib }, diskfs.ErrOutOfRange},
		"other filesystem": {func(r *ClaimRequest) { r.Spec.Filesystem = "btrfs"; r.Spec.Size = 128 * mib }, errdefs.ErrInvalid},
		"other label":      {func(r *ClaimRequest) { r.Spec.Label = "x" }, errdefs.ErrInvalid},
		"as a disk":        {func(r *ClaimRequest) { r.Mode = image.ModeBlock; r.Spec.Filesystem = "raw" }, errdefs.ErrInvalid},
		"of a disk":        {func(r *ClaimRequest) { r.Source = image.Source{Volume: "disk"} }, errdefs.ErrInvalid},
	} {
		r := from("copy", v, image.Source{Snapshot: snap.ID})
		c.change(&r)
		_, _, err := n.CreateClaim(t.Context(), r)
		t.Logf("%s: %v", name, err)
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := n.CreateSnapshot(t.Context(), "snapshot", d.ID); !errors.Is(err, errdefs.ErrExists) {
		t.Errorf("a snapshot of another volume under the same name: %v", err)
	}
	for _, id := range []string{"none", "inline"} {
		if _, err := n.CreateSnapshot(t.Context(), "other", id); !errors.Is(err, errdefs.ErrNotFound) {
			t.Errorf("a snapshot of %s: %v", id, err)
		}
	}
	n.mustUnpublish(inline)
	n.mustDelete(v.ID, d.ID)
	for _, id := range []string{snap.ID, snap.ID, "never-was", "../volumes/source"} {
		if err := n.DeleteSnapshot(id); err != nil {
			t.Error(err)
		}
	}
}

// TestFreezeIsBounded checks both limits of a freeze: its time, whatever the clone does, and
// the number of extents, before the freeze.
func TestFreezeIsBounded(t *testing.T) {
	n := newNode(t, testenv.XFS, gib)
	v := n.mustCreate(claim("slow", "ext4", 64*mib))
	root, err := os.Open(n.mustStage(v))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	img, err := n.images.Open(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	err = whileFrozen(img, root, 100*time.Millisecond, func() error {
		// This write waits until the filesystem is thawed.
		return writeSynced(filepath.Join(root.Name(), "file"), nil)
	})
	t.Log(err)
	if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "100ms") {
		t.Errorf("a clone that takes too long: %v", err)
	}
	var since time.Time
	if err := pool.GetRecord(img.File, pool.FrozenAttr, &since); !errors.Is(err, pool.ErrNoRecord) {
		t.Errorf("the mark is still there: %v", err)
	}
	n.copies.freeze.extents = 1
	_, err = n.CreateSnapshot(t.Context(), "fragmented", v.ID)
	t.Log(err)
	if !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "defragment") {
		t.Errorf("a snapshot of an image of many extents: %v", err)
	}
	n.copies.freeze = defaultFreeze
	root.Close()
	img.Close()
	n.mustEnd(v)
}

// TestSnapshotsAtOnce takes several snapshots of one volume at once. They freeze it one after
// the other.
func TestSnapshotsAtOnce(t *testing.T) {
	n := newNode(t, testenv.Btrfs, 8*gib)
	v := n.mustCreate(claim("busy", "xfs", 300*mib))
	synced, stop := load(t, n.mustPublishClaim(v, "pod"))
	testenv.Eventually(t, "some load", func() bool { return synced() > 2 })
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
			if _, err := n.CreateSnapshot(t.Context(), fmt.Sprintf("s-%d", i), v.ID); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	stop()
	for i := range 8 {
		testenv.Fsck(t, "xfs", n.pool.Snapshot(fmt.Sprintf("s-%d", i)))
		if err := n.DeleteSnapshot(fmt.Sprintf("s-%d", i)); err != nil {
			t.Error(err)
		}
	}
	n.mustEnd(v, "pod")
}
