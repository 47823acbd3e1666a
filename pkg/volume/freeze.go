// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/sweep"
)

// freezeLimits bound how long a pod's writes wait for a copy of its volume.
type freezeLimits struct {
	time    time.Duration // after that the filesystem is thawed, whatever happens
	extents int           // an image with more is not frozen at all
}

// defaultFreeze: a pod that cannot write for seconds begins to fail its probes. A clone
// takes 10 to 24 µs per extent (reflink's doc), so this many stay well within the time. An
// image has them after months of random writes on a copy-on-write pool.
var defaultFreeze = freezeLimits{time: 5 * time.Second, extents: 100_000}

// cloneFrozen clones an image while the filesystem in it is frozen.
func (c copies) cloneFrozen(ctx context.Context, img *image.Image, root, dst *os.File) error {
	extents, err := reflink.Extents(img.File)
	if err != nil {
		return err
	}
	if extents > c.freeze.extents {
		return fmt.Errorf("%w: volume %s is in %d extents, more than %d: its pods could not write for seconds; stop them, or defragment %s (xfs_fsr, btrfs filesystem defragment)",
			errdefs.ErrState, img.ID(), extents, c.freeze.extents, img.Path())
	}
	// What is written here need not be written while everybody waits.
	if err := fsctl.Sync(root); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return whileFrozen(img, root, c.freeze.time, func() error { return reflink.Clone(dst, img.File) })
}

// whileFrozen does something while a volume's filesystem is frozen. It fails if that takes
// longer than the limit, because the filesystem is thawed by then. The caller holds the
// image's lock.
func whileFrozen(img *image.Image, root *os.File, limit time.Duration, do func() error) (err error) {
	// A mark that is found under the lock is of a plugin that died, or could not thaw.
	if _, frozen, err := img.Frozen(); err == nil && frozen {
		if err := thaw(root); err != nil {
			return err
		}
	}
	if err := img.MarkFrozen(); err != nil {
		return err
	}
	if err := fsctl.Freeze(root); err != nil {
		err = errors.Join(err, img.UnmarkFrozen())
		if errors.Is(err, fsctl.ErrFrozen) {
			err = fmt.Errorf("%w: volume %s: %w, by somebody else; wait, or thaw it with fsfreeze -u", errdefs.ErrState, img.ID(), err)
		}
		return err
	}
	start := time.Now()
	late := time.AfterFunc(limit, func() { fsctl.Thaw(root) })
	err = do()
	if !late.Stop() {
		err = errors.Join(err, fmt.Errorf("%w: cloning volume %s took longer than the %s for which its pods may wait; try again when the disk is less busy", errdefs.ErrState, img.ID(), limit))
	}
	if e := thaw(root); e != nil {
		return errors.Join(err, e) // the mark stays: the next copy thaws it, or a sweep
	}
	klog.V(4).InfoS("Froze a volume", "volume", img.ID(), "duration", time.Since(start))
	return errors.Join(err, img.UnmarkFrozen())
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

// thawLeft thaws a filesystem that an earlier process froze and did not live to thaw, or
// returns [sweep.ErrOutdated] if there is none. A filesystem that somebody else froze has
// no mark, and stays frozen.
func (c copies) thawLeft(ctx context.Context, id string) error {
	img, err := c.images.Open(id)
	if err != nil {
		return err
	}
	defer img.Close()
	// A process that lives holds the lock for as long as the filesystem is frozen.
	unlock, err := c.images.Exclusive(ctx, img, place.SettleTime)
	if errors.Is(err, errdefs.ErrUnderWay) {
		return sweep.ErrOutdated
	}
	if err != nil {
		return err
	}
	defer unlock()
	since, frozen, err := img.Frozen()
	if err == nil && !frozen {
		err = sweep.ErrOutdated
	}
	if err != nil {
		return err
	}
	root, err := c.root.OpenFilesystem(img)
	if err != nil {
		return err
	}
	if root == nil {
		if err := c.checkDetached(img); err != nil {
			return err
		}
	} else {
		defer root.Close()
		if err := thaw(root); err != nil {
			return err
		}
		klog.InfoS("Thawed a volume that a plugin had frozen when it died", "volume", id, "since", since)
	}
	return img.UnmarkFrozen()
}

// checkDetached returns [errdefs.ErrState] if an unmounted volume is still attached: a
// frozen filesystem outlives its last mount, and would be frozen in the next.
func (c copies) checkDetached(img *image.Image) error {
	loops, err := loopdev.Find(img.File)
	if err != nil || len(loops) == 0 {
		return err
	}
	return fmt.Errorf("%w: volume %s is frozen and attached as /dev/loop%d, but not mounted below %s: the first sweep after its pod has it again thaws it, or mount the device and run fsfreeze -u",
		errdefs.ErrState, img.ID(), loops[0], c.root.Path(""))
}
