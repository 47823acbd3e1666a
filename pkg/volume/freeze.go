// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// freezing bounds how long a pod's writes wait for a copy of its volume.
type freezing struct {
	limit   time.Duration // then it is thawed, whatever happens
	extents int           // an image of more is not frozen at all
}

// defaultFreezing: a pod that cannot write for seconds begins to fail its probes. A
// clone takes 10 to 24 µs per extent (reflink's doc), so that this many stay well
// within the time; an image has them after months of random writes on a
// copy-on-write pool.
var defaultFreezing = freezing{limit: 5 * time.Second, extents: 100_000}

// cloneLive makes dst, an empty file, the twin of a volume at one moment, though
// pods may be writing to it. What they had synced before is in it.
//
// A mounted filesystem stands still meanwhile. Of a disk that a VM has, what the
// twin holds is what the disk would hold after a power cut.
func (m *Manager) cloneLive(ctx context.Context, img *image, dst *os.File) error {
	// Each waits for the ones before: the first to thaw would thaw for all.
	unlock, err := m.exclusive(ctx, img, 2*m.freezing.limit)
	if err != nil {
		return err
	}
	defer unlock()
	root, err := m.mountedRoot(img)
	if err != nil {
		return err
	}
	if root != nil {
		defer root.Close()
		return m.cloneFrozen(ctx, img, root, dst)
	}
	if dev, err := loopdev.OpenBacked(img.File); err == nil {
		err = dev.Sync()
		dev.Close()
		if err != nil {
			return err
		}
	} else if !errors.Is(err, loopdev.ErrNotAttached) {
		return err
	}
	return reflink.Clone(dst, img.File)
}

// exclusive keeps others from changing, or copying, an image as a whole: whoever
// clones, expands, grows or deletes one holds its lock. What has changed since the
// image was opened is [ErrUnderWay], like a lock that is not to be had in time.
//
// A disk image is not locked, since its pod could hold the lock for ever.
func (m *Manager) exclusive(ctx context.Context, img *image, patience time.Duration) (unlock func() error, err error) {
	if img.Mode == ModeDiskImage {
		return func() error { return nil }, nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	unlock, err = pool.LockImage(ctx, img.File)
	if errors.Is(err, pool.ErrLocked) {
		return nil, fmt.Errorf("%w: something else with volume %s (%v); try again", ErrUnderWay, img.ID, err)
	}
	if err != nil {
		return nil, err
	}
	var now Record
	same, err := sameFile(img.File, m.pool.Volume(img.ID))
	if err == nil && same {
		err = pool.GetRecord(img.File, pool.VolumeAttr, &now)
	}
	if err == nil && (!same || !now.Spec.Equal(img.Spec)) {
		err = fmt.Errorf("%w: volume %s was changed meanwhile; try again", ErrUnderWay, img.ID)
	}
	if err != nil {
		return nil, errors.Join(err, unlock())
	}
	return unlock, nil
}

// mountedRoot opens the root of a volume's filesystem where it is mounted, or
// returns nil if it is not.
func (m *Manager) mountedRoot(img *image) (*os.File, error) {
	if img.Mode != ModeFilesystem {
		return nil, nil
	}
	places, err := m.places(img)
	if err != nil || len(places) == 0 {
		return nil, err
	}
	at, err := m.openPlace(places[0])
	if err != nil {
		return nil, err
	}
	defer at.Close()
	// Something else may be mounted above it.
	rel, err := filepath.Rel(m.mountPath, places[0])
	if err != nil {
		return nil, err
	}
	if _, err := m.shown(img, rel); errors.Is(err, errForeign) {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	} else if err != nil {
		return nil, err
	}
	return mount.Open(at)
}

// sameFile reports whether a path of the pool still names an open image.
func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// cloneFrozen clones an image while the filesystem in it stands still.
func (m *Manager) cloneFrozen(ctx context.Context, img *image, root, dst *os.File) error {
	extents, err := reflink.Extents(img.File)
	if err != nil {
		return err
	}
	if extents > m.freezing.extents {
		return fmt.Errorf("%w: volume %s is in %d extents, more than %d: its pods could not write for seconds; stop them, or defragment %s (xfs_fsr, btrfs filesystem defragment)",
			ErrState, img.ID, extents, m.freezing.extents, img.Name())
	}
	// What is written here need not be written while everybody waits.
	if err := fsctl.Sync(root); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return whileFrozen(img, root, m.freezing.limit, func() error { return reflink.Clone(dst, img.File) })
}

// whileFrozen does something while a volume's filesystem is frozen, and fails if it
// takes longer than the limit, when the filesystem is frozen no more.
func whileFrozen(img *image, root *os.File, limit time.Duration, do func() error) (err error) {
	// One who finds a mark while it holds the image's lock knows that it was frozen by
	// a plugin that died, or could not thaw it.
	var since time.Time
	if pool.GetRecord(img.File, pool.FrozenAttr, &since) == nil {
		if err := thaw(root); err != nil {
			return err
		}
	}
	if err := pool.SetRecord(img.File, pool.FrozenAttr, time.Now().UTC()); err != nil {
		return err
	}
	unmark := func() error { return pool.RemoveRecord(img.File, pool.FrozenAttr) }
	if err := fsctl.Freeze(root); err != nil {
		err = errors.Join(err, unmark())
		if errors.Is(err, fsctl.ErrFrozen) {
			err = fmt.Errorf("%w: volume %s: %w, by somebody else; wait, or thaw it with fsfreeze -u", ErrState, img.ID, err)
		}
		return err
	}
	start := time.Now()
	late := time.AfterFunc(limit, func() { fsctl.Thaw(root) })
	err = do()
	if !late.Stop() {
		err = errors.Join(err, fmt.Errorf("%w: cloning volume %s took longer than the %s for which its pods may wait; try again when the disk is less busy", ErrState, img.ID, limit))
	}
	if e := thaw(root); e != nil {
		return errors.Join(err, e) // the mark stays: the next copy thaws it, or a sweep
	}
	klog.V(4).InfoS("Froze a volume", "volume", img.ID, "duration", time.Since(start))
	return errors.Join(err, unmark())
}

// thaw does not give up at once: a pod hangs until it succeeds.
func thaw(root *os.File) error {
	err := fsctl.Thaw(root)
	for range 2 {
		if err == nil {
			return nil
		}
		err = fsctl.Thaw(root)
	}
	return err
}

// thawLeft thaws what an earlier process has frozen and did not live to thaw, and is
// errNotSo if there is nothing of that. What somebody else has frozen has no mark, and
// stays frozen.
func (m *Manager) thawLeft(id string) error {
	img, err := m.open(id)
	if err != nil {
		return err
	}
	defer img.Close()
	// A process that lives holds the lock for as long as it is frozen.
	unlock, err := m.exclusive(m.ctx, img, settleTime)
	if errors.Is(err, ErrUnderWay) {
		return errNotSo
	}
	if err != nil {
		return err
	}
	defer unlock()
	var since time.Time
	err = pool.GetRecord(img.File, pool.FrozenAttr, &since)
	if errors.Is(err, pool.ErrNoRecord) {
		return errNotSo
	}
	if err != nil {
		return err
	}
	root, err := m.mountedRoot(img)
	if err != nil {
		return err
	}
	if root == nil {
		// A frozen filesystem outlives its last mount, and would be frozen in the next.
		loops, err := loopdev.Find(img.File)
		if err != nil {
			return err
		}
		if len(loops) > 0 {
			return fmt.Errorf("%w: volume %s is attached as /dev/loop%d, and mounted nowhere below %s: the sweep after its pod has it again thaws it, or mount the device and run fsfreeze -u", ErrState, id, loops[0], m.rootPath)
		}
	} else {
		defer root.Close()
		if err := thaw(root); err != nil {
			return err
		}
		klog.InfoS("Thawed a volume that a plugin had frozen when it died", "volume", id, "since", since)
	}
	return pool.RemoveRecord(img.File, pool.FrozenAttr)
}
