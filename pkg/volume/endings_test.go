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
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sync/semaphore"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
)

// mustDirty writes to a volume, and syncs nothing.
func (n *node) mustDirty(at string, bytes int) {
	n.t.Helper()
	if err := os.WriteFile(filepath.Join(at, "dirty"), make([]byte, bytes), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// mustAllocate returns the space that a file takes, in bytes.
func (n *node) mustAllocate(f *os.File) int64 {
	n.t.Helper()
	fi, err := f.Stat()
	if err != nil {
		n.t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Blocks * 512
}

// mustOpenImage opens the image of a volume, so that the test can look at it when it has no name.
func (n *node) mustOpenImage(id string) *os.File {
	n.t.Helper()
	f, err := os.Open(n.pool.Volume(id))
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { f.Close() })
	return f
}

// mustBeEnded waits until all volumes have ended, and no loop device has one of the images.
func (n *node) mustBeEnded(images ...*os.File) {
	n.t.Helper()
	if err := n.endings.wait(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	for _, f := range images { // a process that is being started may have a copy of the mount
		testenv.Eventually(n.t, "the loop device of "+f.Name()+" to go", func() bool {
			loops, err := loopdev.Find(f)
			return err == nil && len(loops) == 0
		})
	}
	if count := n.Ending(); count != 0 {
		n.t.Errorf("%d volumes are ending", count)
	}
}

// TestDeletedIsNotWritten deletes volumes that have much unwritten data. The image, which the test
// keeps, has not got them.
func TestDeletedIsNotWritten(t *testing.T) {
	for _, kind := range testenv.PoolKinds {
		for _, fs := range []string{"ext4", "xfs"} { // Linux 6.18 cannot shut down a btrfs
			t.Run(kind.Name+"-pool/"+fs, func(t *testing.T) {
				n := newNode(t, kind, 4*gib)
				r := n.request("deleted", fs, 1*gib)
				n.mustPublish(r)
				img := n.mustOpenImage(r.ID)
				const bytes = 300 * size.MiB
				n.mustDirty(r.Target, bytes)
				before := n.mustAllocate(img)
				n.mustUnpublish(r)
				n.mustBeEnded(img)
				if took := n.mustAllocate(img); took > bytes/2 {
					t.Errorf("the deleted image takes %s, and %s before", size.Format(took), size.Format(before))
				}
			})
		}
	}
}

// TestDeletedElsewhere deletes volumes while somebody has a copy of the mount. What is shut down
// returns EIO there; what is not goes on. The loop device ends with the copy, and a new volume of
// the same id is another one.
func TestDeletedElsewhere(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for _, fs := range []string{"btrfs", "ext4", "xfs"} {
		for _, bytes := range []int{0, 128 * size.MiB} {
			t.Run(fmt.Sprintf("%s, %d MiB", fs, bytes/size.MiB), func(t *testing.T) {
				n := n.with(t)
				r := n.request("elsewhere", fs, 1*gib)
				n.mustPublish(r)
				img := n.mustOpenImage(r.ID)
				elsewhere := testenv.Dir(t)
				testenv.Run(t, "mount", "--bind", r.Target, elsewhere)
				release := sync.OnceFunc(func() { testenv.Run(t, "umount", elsewhere) })
				defer release()
				n.mustDirty(r.Target, bytes)
				n.mustUnpublish(r)
				if err := n.endings.wait(t.Context()); err != nil {
					t.Fatal(err)
				}
				err := writeSynced(filepath.Join(elsewhere, "later"), []byte("later"))
				if shut := bytes > 0 && fs != "btrfs"; shut != errors.Is(err, syscall.EIO) || !shut && err != nil {
					t.Errorf("writing to the copy: %v", err)
				}
				n.mustPublish(r)
				if err := writeSynced(filepath.Join(r.Target, "new"), []byte("new")); err != nil {
					t.Errorf("the next volume of that id: %v", err)
				}
				release()
				n.mustBeEnded(img)
				n.mustUnpublish(r)
				n.mustBeEnded()
			})
		}
	}
}

// TestBusyIsNotDeleted unpublishes volumes that a process has open. They stay as they are, with
// what was not written yet.
func TestBusyIsNotDeleted(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	for _, fs := range []string{"btrfs", "ext4", "xfs"} {
		t.Run(fs, func(t *testing.T) {
			n := n.with(t)
			r := n.request("busy", fs, 1*gib)
			n.mustPublish(r)
			n.mustDirty(r.Target, 64*size.MiB)
			f, err := os.Open(filepath.Join(r.Target, "dirty"))
			if err != nil {
				t.Fatal(err)
			}
			err = n.Unpublish(r.ID, r.Target)
			if !errors.Is(err, syscall.EBUSY) || !strings.Contains(err.Error(), r.Target) {
				t.Errorf("got %v, want EBUSY and the target", err)
			}
			if err := f.Sync(); err != nil {
				t.Errorf("what was not written yet: %v", err)
			}
			if err := writeSynced(filepath.Join(r.Target, "more"), []byte("more")); err != nil {
				t.Error(err)
			}
			f.Close()
			img := n.mustOpenImage(r.ID)
			n.mustUnpublish(r)
			n.mustBeEnded(img)
		})
	}
}

// TestManyDeletions deletes more volumes at once than may end at a time.
func TestManyDeletions(t *testing.T) {
	n := newNode(t, testenv.XFS, 4*gib)
	n.endings.room = semaphore.NewWeighted(maxEndings)
	if !n.endings.room.TryAcquire(maxEndings - 1) { // as if so many others were ending
		t.Fatal("there is no room")
	}
	var images []*os.File
	for i := range 8 {
		r := n.request(fmt.Sprintf("many-%d", i), "ext4", 300*size.MiB)
		n.mustPublish(r)
		images = append(images, n.mustOpenImage(r.ID))
	}
	var all sync.WaitGroup
	for i := range images {
		all.Go(func() {
			r := n.request(fmt.Sprintf("many-%d", i), "ext4", 300*size.MiB)
			if err := n.Unpublish(r.ID, r.Target); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	n.endings.room.Release(maxEndings - 1)
	n.mustBeEnded(images...)
}

// TestSpaceOfEndings asks for a volume when the space that is free belongs to a volume that is
// ending.
func TestSpaceOfEndings(t *testing.T) {
	n := newNodeWith(t, testenv.XFS, 2*gib, Config{Headroom: size.Share{Percent: 50}})
	full := n.request("full", "ext4", 2*gib)
	n.mustPublish(full)
	if err := writeSynced(filepath.Join(full.Target, "data"), make([]byte, 1200*size.MiB)); err != nil {
		t.Fatal(err)
	}
	n.mustHaveNoRoom("next")
	n.mustUnpublish(full)
	n.mustHaveRoom("next")
}

// TestSpareSpace asks for a volume when the space that is free is kept to save time.
func TestSpareSpace(t *testing.T) {
	var kept []*os.File
	n := newNodeWith(t, testenv.XFS, 2*gib, Config{Headroom: size.Share{Percent: 50}, Spare: func() {
		for _, f := range kept {
			if err := f.Truncate(0); err != nil {
				t.Error(err)
			}
		}
	}})
	n.mustHaveRoom("before") // with its template
	f, err := n.pool.NewVolume()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := syscall.Fallocate(int(f.Fd()), 0, 0, 1200*size.MiB); err != nil {
		t.Fatal(err)
	}
	if err := n.space.Check(); !errors.Is(err, pool.ErrFull) {
		t.Fatalf("got %v, want ErrFull", err)
	}
	kept = append(kept, f)
	n.mustHaveRoom("spared")
}

func (n *node) mustHaveRoom(id string) {
	n.t.Helper()
	r := n.request(id, "ext4", 64*size.MiB)
	n.mustPublish(r)
	n.mustUnpublish(r)
}

func (n *node) mustHaveNoRoom(id string) {
	n.t.Helper()
	if _, err := n.PublishInline(n.t.Context(), n.request(id, "ext4", 64*size.MiB)); !errors.Is(err, pool.ErrFull) {
		n.t.Fatalf("got %v, want ErrFull", err)
	}
}
