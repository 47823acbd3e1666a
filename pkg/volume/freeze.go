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

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fiemap"
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
	time    time.Duration // after this time a timer thaws the filesystem
	extents int           // an image with more extents is not frozen at all
}

// defaultFreeze is short, because a pod that cannot write for seconds begins to fail its
// probes. A clone takes 10 to 24 µs per extent (reflink's doc), so 100 000 extents stay well
// within 5 s. An image has that many after months of random writes on a copy-on-write pool.
var defaultFreeze = freezeLimits{time: 5 * time.Second, extents: 100_000}

// cloneFrozen clones an image while the filesystem in it is frozen.
func (c *copies) cloneFrozen(ctx context.Context, img *image.Image, root, dst *os.File) error {
	extents, err := fiemap.Count(img.File)
	if err != nil {
		return err
	}
	if extents > c.freeze.extents {
		return fmt.Errorf("%w: the image of volume %s has %d extents, and more than %d would stop its pods' writes for seconds; stop the pods, or defragment %s (xfs_fsr, btrfs filesystem defragment)",
			errdefs.ErrState, img.ID(), extents, c.freeze.extents, img.Path())
	}
	// Write dirty data now, so that it need not be written while the pods wait.
	if err := fsctl.Sync(root); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	return whileFrozen(img, root, c.freeze.time, func() error { return reflink.Clone(dst, img.File) })
}

// whileFrozen calls do while a volume's filesystem is frozen. It fails if do takes longer
// than the limit, because the filesystem is thawed by then. The caller holds the image's
// lock.
func whileFrozen(img *image.Image, root *os.File, limit time.Duration, do func() error) (err error) {
	// This call holds the lock, so a mark is from a plugin that died, or could not thaw.
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
			err = fmt.Errorf("%w: volume %s: %w, and not by this plugin; wait, or thaw it with fsfreeze -u", errdefs.ErrState, img.ID(), err)
		}
		return err
	}
	start := time.Now()
	late := time.AfterFunc(limit, func() { fsctl.Thaw(root) })
	err = do()
	if !late.Stop() {
		err = errors.Join(err, fmt.Errorf("%w: cloning volume %s took longer than %s, and its pods must not wait longer; try again when the disk is less busy", errdefs.ErrState, img.ID(), limit))
	}
	if e := thaw(root); e != nil {
		return errors.Join(err, e) // the mark stays, so the next copy or a sweep thaws it
	}
	klog.V(4).InfoS("Froze a volume", "volume", img.ID(), "duration", time.Since(start))
	return errors.Join(err, img.UnmarkFrozen())
}

// thaw thaws a filesystem. It tries three times, because pods hang until it succeeds.
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

// thawLeft thaws a volume's filesystem if an earlier process froze it and died before it
// could thaw it. If none did, it returns [sweep.ErrOutdated]. A filesystem that somebody
// else froze has no mark, and stays frozen.
func (c *copies) thawLeft(ctx context.Context, id string) error {
	img, err := c.images.Open(id)
	if err != nil {
		return err
	}
	defer img.Close()
	// A living process holds the lock as long as it keeps the filesystem frozen.
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

// checkDetached returns [errdefs.ErrState] if an unmounted volume is still attached. A
// frozen filesystem survives its last unmount, and would still be frozen in the next mount.
func (c *copies) checkDetached(img *image.Image) error {
	loops, err := loopdev.Find(img.File)
	if err != nil || len(loops) == 0 {
		return err
	}
	return fmt.Errorf("%w: volume %s is frozen and attached as /dev/loop%d, but not mounted below %s: the first sweep after its pod has it again thaws it, or mount the device and run fsfreeze -u",
		errdefs.ErrState, img.ID(), loops[0], c.root.Path(""))
}
