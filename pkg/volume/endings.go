// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// endings let what is left of deleted volumes end after the call that deleted them: a
// filesystem that is mounted at no path, and the extents of an image without a name. Only
// descriptors hold these, so they also end with the process.
//
// A filesystem with much that is unwritten is shut down before it is unmounted, so that nothing
// of it is written any more. Another process may still have a copy of the mount, in another
// mount namespace: it gets EIO from then on, and the space is freed when it ends.
type endings struct {
	room  *semaphore.Weighted
	count *atomic.Int64
	under *ending
}

// ending are the volumes that end.
type ending struct {
	mu      sync.Mutex
	records map[*os.File]image.Record
}

// maxEndings bounds how many volumes end at a time, and so the kernel's memory and the loop
// devices that they hold. A deletion beyond it does its own work before it answers.
const maxEndings = 64

// answerFirst is how long an ending waits, so that it does not take the processor from the
// answer to the call.
const answerFirst = 5 * time.Millisecond

func newEndings() endings {
	return endings{semaphore.NewWeighted(maxEndings), &atomic.Int64{}, &ending{records: map[*os.File]image.Record{}}}
}

// Ending counts the volumes and snapshots that were deleted and still take space.
func (m *Manager) Ending() int { return int(m.endings.count.Load()) }

// volume ends an inline volume that has neither a path nor a name any more, and closes its image.
func (e endings) volume(img *image.Image, was place.Cleared) {
	e.begin(e.listed(img, func() { end(img, was, dropUnwritten) }))
}

// kept is [endings.volume] for a volume whose content is kept. It calls done after that, with what could not be
// written.
func (e endings) kept(img *image.Image, was place.Cleared, done func(unwritten error)) {
	e.begin(func() {
		err := writeOut(img, was.Root)
		end(img, was, nil)
		done(err)
	})
}

// writeOut writes everything that is dirty in a volume's filesystem to its image, and marks the image so. Unmounting
// would write it too, and drop what cannot be written without an error. A filesystem that is nil is not mounted.
//
// "In Linux since Linux 5.8, syncfs() will report an error if one or more inodes failed to be written back since the
// last syncfs() call." syncfs(2)
func writeOut(img *image.Image, d *mount.Detached) error {
	if d == nil {
		return nil
	}
	root, err := mount.Open(d.File())
	if err != nil {
		return err
	}
	defer root.Close()
	if err := fsctl.Sync(root); err != nil {
		return err
	}
	return img.MarkWritten()
}

// image closes the image of a volume that has no name and no device. With its last descriptor the kernel frees its
// extents.
func (e endings) image(img *image.Image) {
	e.begin(e.listed(img, func() { img.Close() }))
}

// listed is do, of which [endings.list] tells meanwhile.
func (e endings) listed(img *image.Image, do func()) func() {
	e.under.mu.Lock()
	e.under.records[img.File] = img.Record
	e.under.mu.Unlock()
	return func() {
		defer e.under.forget(img.File)
		do()
	}
}

func (e *ending) forget(f *os.File) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.records, f)
}

// list lists the volumes that end, by id.
func (e endings) list() (all []Listed) {
	e.under.mu.Lock()
	records := maps.Clone(e.under.records)
	e.under.mu.Unlock()
	for f, r := range records {
		v := Listed{Record: r, Phase: IsEnding}
		if allocated, err := image.Allocated(f); err == nil { // an error: it has just ended
			v.Allocated, v.Used = allocated, allocated
		}
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b Listed) int { return cmp.Compare(a.ID, b.ID) })
	return all
}

// file is [endings.image] for the image of a snapshot.
func (e endings) file(f *os.File) {
	e.begin(func() { f.Close() })
}

func (e endings) begin(do func()) {
	e.count.Add(1)
	finish := func() {
		defer e.count.Add(-1)
		do()
	}
	if !e.room.TryAcquire(1) {
		finish()
		return
	}
	time.AfterFunc(answerFirst, func() {
		defer e.room.Release(1)
		finish()
	})
}

// freeing is how long a caller who needs space waits for endings: as long as the kernel may take
// to write a volume of a filesystem that cannot be shut down.
const freeing = 5 * time.Second

// patiently is [endings.wait] for a while.
func (e endings) patiently() {
	ctx, cancel := context.WithTimeout(context.Background(), freeing)
	defer cancel()
	_ = e.wait(ctx) // the caller finds out what is free
}

// wait waits until all volumes have ended that were deleted up to now.
func (e endings) wait(ctx context.Context) error {
	if err := e.room.Acquire(ctx, maxEndings); err != nil {
		return err
	}
	e.room.Release(maxEndings)
	return nil
}

// end ends a volume. drop, if not nil, is called first.
func end(img *image.Image, was place.Cleared, drop func(*image.Image, *mount.Detached) error) {
	if was.Root != nil {
		if drop != nil {
			if err := drop(img, was.Root); err != nil && !errors.Is(err, errors.ErrUnsupported) {
				klog.ErrorS(err, "A deleted volume could not be shut down; it is unmounted all the same, and written before that", "volume", img.ID())
			}
		}
		// While the filesystem is mounted, nobody else can have the device.
		if err := device.GiveBack(img, was.Device); err != nil {
			klog.ErrorS(err, "The loop device of a deleted volatile volume still drops flushes, until the plugin uses it again",
				"volume", img.ID(), "loopDevice", was.Device)
		}
		was.Root.Close()
	}
	device.LetGo(img, was.Device)
	img.Close()
}

// worthShutdown is how much of a volume must be unwritten for a shutdown, in bytes. The kernel
// writes two alerts about one to its console, which takes milliseconds if that is a serial line.
// An empty xfs counts up to 32 MiB and 1/128 of its size as used, which it only reserves.
func worthShutdown(volume int64) int64 { return 48*size.MiB + volume/128 }

// dropUnwritten shuts a filesystem down if much of it is not written yet. What a filesystem
// uses beyond what its image has allocated is unwritten; there may be more.
func dropUnwritten(img *image.Image, d *mount.Detached) error {
	root, err := mount.Open(d.File())
	if err != nil {
		return err
	}
	defer root.Close()
	is, err := fsctl.StatusOf(root)
	if err != nil {
		return err
	}
	allocated, err := img.Allocated()
	if err != nil || is.Used-allocated < worthShutdown(img.Record.Spec.Size) {
		return err
	}
	return fsctl.Shutdown(root)
}
