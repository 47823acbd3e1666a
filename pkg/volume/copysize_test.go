// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/health"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// diskHarms are what a pod may do to the length of its disk.img, of 16 MiB.
var diskHarms = map[string]func(path string) error{
	"untouched":     func(string) error { return nil },
	"grown, sparse": func(path string) error { return os.Truncate(path, 50*gib) },
	"grown, with data": func(path string) error {
		return errors.Join(os.Truncate(path, 50*gib), writeAt(path, bytes.Repeat([]byte("excess.."), 64*mib/8), 16*mib))
	},
	"grown by a little": func(path string) error { return writeAt(path, []byte("excess"), 16*mib) },
	"shortened":         func(path string) error { return os.Truncate(path, mib+100) },
	"barely a disk":     func(path string) error { return os.Truncate(path, mib) },
}

func writeAt(path string, b []byte, at int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, at)
	return errors.Join(err, f.Sync(), f.Close())
}

// TestCopiesHaveTheirSize copies a disk.img whose length its pod has changed, in every way that
// leaves a disk (TestEmptiedDisk). A copy has the size of its claim, the source's content within
// that, and zeros behind it. The pod's file stays as it is.
func TestCopiesHaveTheirSize(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 8*gib)
			for name, harm := range diskHarms {
				t.Run(name, func(t *testing.T) { n.with(t).copyHarmed(harm, image.Thin) })
			}
			for _, name := range []string{"grown, with data", "shortened"} {
				t.Run("thick, "+name, func(t *testing.T) { n.with(t).copyHarmed(diskHarms[name], image.Thick) })
			}
		})
	}
}

// TestEmptiedDisk empties a disk.img as CDI does, with qemu-img of another user in a mount namespace of
// its own. Nobody can take a copy of that for a copy of the disk, and everybody is told. A disk that is
// only shorter is copied.
func TestEmptiedDisk(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, gib)
			v := n.mustCreate(ClaimRequest{Name: "vm", Spec: diskfs.Spec{Filesystem: "raw", Size: 16 * mib}, Mode: image.ModeDiskImage})
			path := filepath.Join(n.mustPublishClaim(v, "pod"), image.DiskName)
			n.mustReport()
			for _, bytes := range []string{"0", "4096"} {
				n.mustMakeDisk(path, bytes)
				n.mustReport(health.DiskImageEmptied)
				_, errSnapshot := n.CreateSnapshot(t.Context(), "snapshot", v.ID)
				_, _, errClone := n.CreateClaim(t.Context(), from("cloned", v, image.Source{Volume: v.ID}))
				for _, err := range []error{errSnapshot, errClone} {
					if t.Log(err); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "emptied") {
						t.Errorf("a copy of a disk of %s bytes: %v", bytes, err)
					}
				}
			}
			if s, _, err := n.ListSnapshots("", "", 0); err != nil || len(s) > 0 {
				t.Errorf("snapshots: %v %v", s, err)
			}
			n.mustMakeDisk(path, "8M")
			n.mustReport(health.DiskImageShortened)
			n.mustSnapshot("snapshot", v.ID)
			n.mustMakeDisk(path, "16M")
			n.mustReport()
			if err := n.DeleteSnapshot(SnapshotID("snapshot")); err != nil {
				t.Error(err)
			}
			n.mustEnd(v, "pod")
		})
	}
}

// mustMakeDisk makes a raw disk of so many bytes in the place of another one, as the user of QEMU in
// the pod of a VM.
func (n *node) mustMakeDisk(path, bytes string) {
	n.t.Helper()
	n.mustGive(path)
	testenv.Run(n.t, "unshare", inPod(filepath.Dir(path), "qemu-img", "create", "-q", "-f", "raw", image.DiskName, bytes)...)
}

// mustReport finds exactly the given conditions of disk.img files, as the log and /readyz do.
func (n *node) mustReport(want ...string) {
	n.t.Helper()
	if err := n.CheckDisks(n.t.Context()); err != nil {
		n.t.Error(err)
	}
	var codes []string
	for _, c := range n.DiskHealth() {
		codes = append(codes, c.Code)
		if c.Object == "" || !c.StillReady {
			n.t.Errorf("found %+v", c)
		}
	}
	if !slices.Equal(codes, want) {
		n.t.Errorf("found %q, want %q", codes, want)
	}
}

// qemuUser is the user and the group that QEMU has in KubeVirt's pods.
const qemuUser = 107

// mustGive gives a disk.img to [qemuUser], as kubelet does for an fsGroup.
func (n *node) mustGive(path string) {
	n.t.Helper()
	if err := os.Chown(path, qemuUser, qemuUser); err != nil {
		n.t.Fatal(err)
	}
}

// inPod are the arguments of unshare for a program that runs as in the pod of a VM: as [qemuUser], in a
// mount namespace of its own, in which the volume's directory is bound at a path that it is in.
func inPod(dir string, args ...string) []string {
	id := strconv.Itoa(qemuUser)
	return append([]string{
		"--mount", "sh", "-c", `mount --rbind "$0" /mnt && cd /mnt && exec "$@"`, dir,
		"setpriv", "--reuid", id, "--regid", id, "--clear-groups",
	}, args...)
}

func (n *node) copyHarmed(harm func(path string) error, p image.Provisioning) {
	t := n.t
	const has = 16 * mib
	v := n.mustCreate(ClaimRequest{Name: "source", Spec: diskfs.Spec{Filesystem: "raw", Size: has}, Mode: image.ModeDiskImage, Provisioning: p})
	path := filepath.Join(n.mustPublishClaim(v, "pod"), image.DiskName)
	err := errors.Join(writeAt(path, []byte("begin"), 0), writeAt(path, []byte("middle"), 5*mib), writeAt(path, []byte("end"), has-3), harm(path))
	if err != nil {
		t.Fatal(err)
	}
	before := length(t, path)
	want := make([]byte, has) // what a copy holds: the source's content, or zeros
	if f, err := os.Open(path); err != nil {
		t.Fatal(err)
	} else {
		f.ReadAt(want, 0)
		f.Close()
	}

	snap := n.mustSnapshot("snapshot", v.ID)
	if got := length(t, n.pool.Snapshot(snap.ID)); snap.Spec.Size != has || got != has {
		t.Errorf("the snapshot has %d bytes, its record %d, want %d", got, snap.Spec.Size, has)
	}
	// An older plugin made snapshots as long as the pod's file was.
	n.checkCopies("restored", v, image.Source{Snapshot: snap.ID}, want)
	if err := os.Truncate(n.pool.Snapshot(snap.ID), before); err != nil {
		t.Fatal(err)
	}
	n.checkCopies("restored-old", v, image.Source{Snapshot: snap.ID}, want)
	n.checkCopies("cloned", v, image.Source{Volume: v.ID}, want)

	if now := length(t, path); now != before {
		t.Errorf("the pod's file had %d bytes, and has %d", before, now)
	}
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		t.Error(err)
	}
	n.mustEnd(v, "pod")
}

// checkCopies makes a volume of each form from a source, of its size or larger.
func (n *node) checkCopies(name string, v image.Record, s image.Source, want []byte) {
	for _, form := range []struct {
		mode   image.Mode
		p      image.Provisioning
		larger int64
	}{
		{image.ModeBlock, image.Thin, 0},
		{image.ModeBlock, image.Thick, 8 * mib},
		{image.ModeDiskImage, image.Thin, 8 * mib},
		{image.ModeDiskImage, image.Thick, 0},
	} {
		r := from(fmt.Sprintf("%s-%s-%s", name, form.mode, form.p), v, s)
		r.Mode, r.Provisioning, r.Spec.Size = form.mode, form.p, int64(len(want))+form.larger
		n.checkCopy(r, want)
	}
}

func (n *node) checkCopy(r ClaimRequest, want []byte) {
	t := n.t
	size := r.Spec.Size
	c := n.mustCreate(r)
	if got := length(t, n.pool.Volume(c.ID)); c.Spec.Size != size || got != size {
		t.Errorf("%s: the image has %d bytes, its record %d, want %d", c.ID, got, c.Spec.Size, size)
		n.mustDelete(c.ID)
		return
	}
	img, err := n.images.Open(c.ID)
	if err != nil {
		t.Fatal(err)
	}
	taken, err := img.Allocated()
	img.Close()
	if err != nil || taken > size+mib || c.Provisioning == image.Thick && taken < size {
		t.Errorf("%s: it takes %d bytes of the pool: %v", c.ID, taken, err)
	}
	at := n.mustPublishClaim(c, "pod")
	if c.Mode == image.ModeDiskImage {
		at = filepath.Join(at, image.DiskName)
		if got := length(t, at); got != size {
			t.Errorf("%s: disk.img has %d bytes, want %d", c.ID, got, size)
		}
	} else if got := strings.TrimSpace(testenv.Run(t, "blockdev", "--getsize64", at)); got != strconv.FormatInt(size, 10) {
		t.Errorf("%s: the device has %s bytes, want %d", c.ID, got, size)
	}
	if got := readAll(t, at); !bytes.Equal(got, append(want[:len(want):len(want)], make([]byte, size-int64(len(want)))...)) {
		t.Errorf("%s: its %d bytes are not those of its source", c.ID, len(got))
	}
	n.mustEnd(c, "pod")
}

func length(t testing.TB, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// TestCopiesOfHalfExpanded copies volumes whose image is longer than the record says: the
// plugin was killed while it expanded them.
func TestCopiesOfHalfExpanded(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 4*gib)
			for _, r := range []ClaimRequest{
				claim("half-ext4", "ext4", 64*mib), claim("half-xfs", "xfs", 300*mib), claim("half-btrfs", "btrfs", 128*mib), disk("half-block", 64*mib),
			} {
				for _, p := range []image.Provisioning{image.Thin, image.Thick} {
					r.Provisioning = p
					v := n.mustCreate(r)
					if err := os.Truncate(n.pool.Volume(v.ID), v.Spec.Size+100*mib); err != nil {
						t.Fatal(err)
					}
					n.mustStage(v)
					snap := n.mustSnapshot("snapshot", v.ID)
					if got := length(t, n.pool.Snapshot(snap.ID)); got != v.Spec.Size {
						t.Errorf("%s, %s: the snapshot has %d bytes, want %d", v.ID, p, got, v.Spec.Size)
					}
					for i, s := range []image.Source{{Snapshot: snap.ID}, {Volume: v.ID}} {
						c := from(fmt.Sprintf("%s-copy-%d", v.ID, i), v, s)
						c.Provisioning = p
						made := n.mustCreate(c)
						if got := length(t, n.pool.Volume(made.ID)); got != v.Spec.Size {
							t.Errorf("%s, %s: the copy of %s has %d bytes, want %d", v.ID, p, s, got, v.Spec.Size)
						}
						if v.Mode == image.ModeFilesystem {
							testenv.Fsck(t, v.Spec.Filesystem, n.pool.Volume(made.ID))
						}
						n.mustDelete(made.ID)
					}
					if err := n.DeleteSnapshot(snap.ID); err != nil {
						t.Error(err)
					}
					n.mustEnd(v)
				}
			}
		})
	}
}

// TestGrowsToItsRecord grows a filesystem whose image is longer than its record says. The
// filesystem must not become larger than the record, or copies of the volume would lack its
// end.
func TestGrowsToItsRecord(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for _, fs := range diskfs.Names() {
		v := n.mustCreate(claim("grows-"+fs, fs, 300*mib))
		if _, _, err := n.Expand(v.ID, Size{Required: 400 * mib}, nil); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(n.pool.Volume(v.ID), 800*mib); err != nil {
			t.Fatal(err)
		}
		at := n.mustStage(v)
		if u, err := n.Stats(v.ID, at); err != nil || u.TotalBytes > 400*mib {
			t.Errorf("%s: the filesystem has %d bytes: %v", fs, u.TotalBytes, err)
		}
		snap := n.mustSnapshot("grows-"+fs, v.ID)
		restored := n.mustCreate(ClaimRequest{Name: "restored-" + fs, Mode: v.Mode, Source: image.Source{Snapshot: snap.ID}, AnyFilesystem: true})
		n.mustPublishClaim(restored, "pod")
		n.mustEnd(restored, "pod")
		if err := n.DeleteSnapshot(snap.ID); err != nil {
			t.Error(err)
		}
		n.mustEnd(v)
	}
}

// TestCopyOfTooLargeFilesystem has a filesystem that is larger than its volume's record says,
// as an older plugin could make one. A copy of the recorded size would lack its end, so there
// is none until the volume is expanded.
func TestCopyOfTooLargeFilesystem(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	v := n.mustCreate(claim("too-large", "ext4", 64*mib))
	if err := os.Truncate(n.pool.Volume(v.ID), 100*mib); err != nil {
		t.Fatal(err)
	}
	testenv.Run(t, "resize2fs", "-f", n.pool.Volume(v.ID))
	_, err := n.CreateSnapshot(t.Context(), "snapshot", v.ID)
	if t.Log(err); !errors.Is(err, errdefs.ErrState) || !strings.Contains(err.Error(), "100Mi") || !strings.Contains(err.Error(), "expand") {
		t.Errorf("a snapshot: %v", err)
	}
	if _, _, err := n.Expand(v.ID, Size{Required: 100 * mib}, nil); err != nil {
		t.Fatal(err)
	}
	snap := n.mustSnapshot("snapshot", v.ID)
	testenv.Fsck(t, "ext4", n.pool.Snapshot(snap.ID))
	if err := n.DeleteSnapshot(snap.ID); err != nil {
		t.Error(err)
	}
	n.mustDelete(v.ID)
}
