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
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/template"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/golden"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestPromote promotes snapshots of a claim that a pod uses, one after the other, and hands a generation on: first to
// a claim, which has what the snapshot had. Nothing that was made needs what it was made of.
func TestPromote(t *testing.T) { everywhere(t, 8*gib, (*node).promotes) }

func (n *node) promotes(fs string) {
	t := n.t
	p := NewPromoter(n.pool)
	parent := n.mustCreate(claim("origin-"+fs, fs, 300*mib))
	target := n.mustPublishClaim(parent, "pod")
	to := golden.Name{Namespace: "shop", Name: "cache-" + fs}
	if err := errors.Join(os.Mkdir(filepath.Join(target, image.CommitDir), 0o755), writeSynced(filepath.Join(target, image.CommitMark), nil)); err != nil {
		t.Fatal(err)
	}
	var snaps []image.SnapshotRecord
	uuids := map[string]bool{}
	for i := range 3 {
		if err := writeSynced(filepath.Join(target, numbered(i)), content(i)); err != nil {
			t.Fatal(err)
		}
		snap := n.mustSnapshot(fmt.Sprintf("origin-%s-%d", fs, i), parent.ID)
		snaps = append(snaps, snap)
		made, err := p.Snapshot(t.Context(), snap.ID, to, 2)
		if err != nil {
			t.Fatal(err)
		}
		if want := []golden.Generation{{Name: to, Number: i - 1}}; made.Generation != (golden.Generation{Name: to, Number: i + 1}) || (i == 2) != (len(made.Gone) == 1) || i == 2 && made.Gone[0] != want[0] {
			t.Errorf("made %v, and %v went", made.Generation, made.Gone)
		}
		d, err := p.goldens.Describe(made.Generation)
		if r := d.Record; err != nil || r.By != "snapshot "+snap.ID+" of claim "+parent.Name || !r.Spec.Equal(snap.Spec) || r.UUID == snap.UUID || uuids[r.UUID.String()] {
			t.Errorf("%+v: %v", r, err)
		}
		uuids[d.Record.UUID.String()] = true
		testenv.Fsck(t, fs, p.goldens.Path(made.Generation))
		if d.Own == 0 || d.Own >= d.Bytes || d.Own+d.Shared() != d.Bytes {
			t.Errorf("%d of its %d bytes are its own, beside the snapshot", d.Own, d.Bytes)
		}
	}

	second := golden.Generation{Name: to, Number: 2}
	r, snap, err := p.HandOn(t.Context(), second, "other")
	if err != nil {
		t.Fatal(err)
	}
	if _, again, err := p.HandOn(t.Context(), second, "other"); err != nil || again.ID != snap.ID || again.UUID != snap.UUID {
		t.Errorf("once more: %+v: %v", again, err)
	}
	if _, another, err := p.HandOn(t.Context(), golden.Generation{Name: to}, "shop"); err != nil || another.ID == snap.ID {
		t.Errorf("for another namespace: %+v: %v", another, err)
	} else if err := n.DeleteSnapshot(another.ID); err != nil {
		t.Error(err)
	}
	if snap.UUID == r.UUID || snap.Mode != image.ModeFilesystem || !strings.HasPrefix(snap.Volume, "golden-") {
		t.Errorf("%+v", snap)
	}

	// Everything that they were made of goes.
	n.mustEnd(parent, "pod")
	n.mustDelete(parent.ID)
	for _, s := range snaps {
		if err := n.DeleteSnapshot(s.ID); err != nil {
			t.Error(err)
		}
	}
	gone, err := p.goldens.Choose(to.String())
	if err != nil || len(gone) != 2 {
		t.Errorf("the golden has %v: %v", gone, err)
	}
	if err := p.goldens.RemoveDurably(gone...); err != nil {
		t.Error(err)
	}
	restored := n.mustCreate(from("restored-of-golden-"+fs, parent, image.Source{Snapshot: snap.ID}))
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		t.Error(err)
	}
	at := n.mustPublishClaim(restored, "pod")
	mustHold(t, "restored", at, 2)
	for _, name := range []string{numbered(2), image.CommitDir} { // written after the generation, and the mark of a commit
		if _, err := os.Lstat(filepath.Join(at, name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the restored claim has %s: %v", name, err)
		}
	}
	n.mustEnd(restored, "pod")
	n.mustDelete(restored.ID)
}

// TestPromotedIsLean promotes snapshots of a claim whose files were deleted. The golden has no space of those that
// are gone, and few pieces where that costs little.
func TestPromotedIsLean(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			n.promotesLean("few", func(i int) bool { return i%10 == 0 }, func(had, has int64, extents int) bool { return has < had/4 })
			n.promotesLean("most", func(i int) bool { return i%10 != 0 }, func(had, has int64, extents int) bool { return extents <= fewExtents })
		})
	}
}

func (n *node) promotesLean(name string, stays func(file int) bool, ok func(had, has int64, extents int) bool) {
	t := n.t
	t.Helper()
	p := NewPromoter(n.pool)
	vol := n.mustCreate(claim(name, "ext4", 300*mib))
	target := n.mustPublishClaim(vol, "pod")
	const files, bytes = 1000, 64 << 10
	for i := range files {
		if err := os.WriteFile(filepath.Join(target, numbered(i)), make([]byte, bytes), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	testenv.Run(t, "sync", "-f", target)
	for i := range files {
		if stays(i) {
			continue
		}
		if err := os.Remove(filepath.Join(target, numbered(i))); err != nil {
			t.Fatal(err)
		}
	}
	snap := n.mustSnapshot(name, vol.ID)
	made, err := p.Snapshot(t.Context(), snap.ID, golden.Name{Name: name}, 0)
	if err != nil {
		t.Fatal(err)
	}
	of, e1 := p.images.OpenSnapshot(snap.ID)
	g, e2 := p.goldens.Open(made.Generation)
	if err := errors.Join(e1, e2); err != nil {
		t.Fatal(err)
	}
	defer of.Close()
	defer g.Close()
	had, e1 := image.Allocated(of.File)
	has, e2 := image.Allocated(g.File)
	extents, e3 := fiemap.Count(g.File)
	if err := errors.Join(e1, e2, e3); err != nil || had < files*bytes || !ok(had, has, extents) {
		t.Errorf("%s: of %d bytes the golden has %d, in %d extents: %v", name, had, has, extents, err)
	}
	n.mustEnd(vol, "pod")
	n.mustDelete(vol.ID)
	if err := errors.Join(n.DeleteSnapshot(snap.ID), p.goldens.RemoveDurably(made.Generation)); err != nil {
		t.Error(err)
	}
}

// TestPromoteRefused promotes what cannot be a golden, and leaves nothing.
func TestPromoteRefused(t *testing.T) {
	n := newNode(t, testenv.XFS, 2*gib)
	p := NewPromoter(n.pool)
	block := n.mustCreate(disk("block", 64*mib))
	of := n.mustSnapshot("of-block", block.ID)
	vol := n.mustCreate(claim("filesystem", "ext4", 64*mib))
	short := n.mustSnapshot("short", vol.ID)
	if err := os.Truncate(n.pool.Snapshot(short.ID), 32*mib); err != nil {
		t.Fatal(err)
	}
	to := golden.Name{Name: "cache"}
	for id, c := range map[string]struct {
		kind error
		says string
	}{
		of.ID:     {errdefs.ErrState, "is of a disk (mode block)"},
		short.ID:  {errdefs.ErrState, "its image has only 32Mi of its 64Mi"},
		"nothing": {errdefs.ErrNotFound, "nothing"},
		"../x":    {errdefs.ErrInvalid, "id"},
	} {
		if made, err := p.Snapshot(t.Context(), id, to, 2); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %+v: %v; want %q", id, made, err, c.says)
		}
	}
	whole := &template.Template{Record: template.Record{Spec: diskfs.Spec{Filesystem: diskfs.Disk, Content: "vm"}}}
	if _, err := p.Template(t.Context(), whole, to, 2); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "content vm is a whole disk") {
		t.Error(err)
	}
	if _, _, err := p.HandOn(t.Context(), golden.Generation{Name: to}, "shop"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Error(err)
	}
	if left, err := p.goldens.List(); err != nil || len(left) > 0 {
		t.Errorf("left are %v: %v", left, err)
	}

	good := n.mustSnapshot("good", vol.ID)
	if err := os.Remove(filepath.Join(n.pool.Root(), "goldens")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Snapshot(t.Context(), good.ID, to, 2); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "start this version of the plugin") {
		t.Errorf("in a pool of an older plugin: %v", err)
	}
	for _, id := range []string{of.ID, short.ID, good.ID} {
		if err := n.DeleteSnapshot(id); err != nil {
			t.Error(err)
		}
	}
	n.mustDelete(block.ID, vol.ID)
}

// TestHandOnTorn hands a golden on again after a power cut took the content of its snapshot.
func TestHandOnTorn(t *testing.T) {
	n := newNode(t, testenv.Btrfs, 2*gib)
	p := NewPromoter(n.pool)
	vol := n.mustCreate(claim("filesystem", "ext4", 64*mib))
	made, err := p.Snapshot(t.Context(), n.mustSnapshot("snapshot", vol.ID).ID, golden.Name{Namespace: "shop", Name: "cache"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, snap, err := p.HandOn(t.Context(), made.Generation, "shop")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(n.pool.Snapshot(snap.ID), 0); err != nil {
		t.Fatal(err)
	}
	_, again, err := p.HandOn(t.Context(), made.Generation, "shop")
	if err != nil || again.ID != snap.ID || again.UUID == snap.UUID {
		t.Errorf("%+v: %v", again, err)
	}
	testenv.Fsck(t, "ext4", n.pool.Snapshot(snap.ID))
	for _, id := range []string{snap.ID, "snapshot"} {
		if err := n.DeleteSnapshot(id); err != nil {
			t.Error(err)
		}
	}
	if err := p.goldens.RemoveDurably(made.Generation); err != nil {
		t.Error(err)
	}
	n.mustDelete(vol.ID)
}
