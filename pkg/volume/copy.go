// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// copies makes copies of volumes, for snapshots and clones, while pods use them.
type copies struct {
	images  *image.Store
	root    *place.Root
	devices *device.Devices
	freeze  freezeLimits
}

// copyLive fills an empty file with the content that a volume has at one moment. The file
// gets the length that the volume's record says. The two share extents only if both are thin.
func (c *copies) copyLive(ctx context.Context, vol *image.Image, dst *os.File, into image.Provisioning) error {
	if vol.Record.Provisioning.SharesExtents() && into.SharesExtents() {
		return c.cloneLive(ctx, vol, dst)
	}
	// Clone the volume, copy the clone, then drop it. The clone is a stable source. Sharing
	// extents any longer would cost a thick volume new space at its next write.
	still, err := c.images.New()
	if err != nil {
		return err
	}
	defer still.Close()
	if err := c.cloneLive(ctx, vol, still); err != nil {
		return err
	}
	if !into.SharesExtents() {
		return c.images.Fill(ctx, into, dst, still, vol.Record.Spec.Size)
	}
	if err := sparse.SetLength(dst, vol.Record.Spec.Size); err != nil {
		return err
	}
	return sparse.Copy(ctx, dst, still) // as sparse as its source
}

// copied is the space that a copy of a volume may come to take, in bytes. A disk.img that its
// pod has enlarged may take more itself.
func copied(vol *image.Image) (int64, error) {
	allocated, err := vol.Allocated()
	return min(allocated, vol.Record.Spec.Size), err
}

// cloneLive makes an empty file the clone of a volume at one moment. Pods may be writing to
// the volume. The clone has everything that they had synced before, and the length that the
// volume's record says.
//
// A mounted filesystem is frozen meanwhile. The clone of a disk has the content that the disk
// would have after a power cut.
func (c *copies) cloneLive(ctx context.Context, img *image.Image, dst *os.File) error {
	if err := c.cloneWhole(ctx, img, dst); err != nil {
		return err
	}
	clone := &image.Image{File: dst, Record: img.Record}
	if err := clone.CheckSource(); err != nil { // a pod may empty its disk.img at any time
		return err
	}
	return sparse.SetLength(dst, img.Record.Spec.Size)
}

// cloneWhole is [copies.cloneLive] with the length that the volume's file has.
func (c *copies) cloneWhole(ctx context.Context, img *image.Image, dst *os.File) error {
	// One copy at a time: with two at once, the first thaw would end the freeze of both.
	unlock, err := c.images.Exclusive(ctx, img, 2*c.freeze.time)
	if err != nil {
		return err
	}
	defer unlock()
	root, err := c.root.OpenFilesystem(img)
	if err != nil {
		return err
	}
	if root != nil {
		defer root.Close()
		return c.cloneFrozen(ctx, img, root, dst)
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

// newIdentity gives the filesystem in an unmounted file the UUID id. If its journal waits
// for replay, it is mounted first, at no path. After a freeze, xfs always needs that.
func (c *copies) newIdentity(f *os.File, filesystem string, id uuid.UUID) error {
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		return err
	}
	err = checkFits(f, fs)
	if err == nil {
		err = fs.NewIdentity(f, f, id)
	}
	if errors.Is(err, diskfs.ErrCorrupt) {
		return fmt.Errorf("%w: %w; check the source with %s", errdefs.ErrState, err, fs.Checker)
	}
	if !errors.Is(err, diskfs.ErrUnclean) {
		return err
	}
	if err := c.replay(f, fs); err != nil {
		return err
	}
	return fs.NewIdentity(f, f, id)
}

// checkFits returns [errdefs.ErrState] if a filesystem is larger than the file that it is in.
func checkFits(f *os.File, fs *diskfs.Filesystem) error {
	sb, err := fs.Identify(f)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err == nil && sb.Size > fi.Size() {
		err = fmt.Errorf("%w: its filesystem has %s, and the volume has %s: expand it to at least that, and try again; nothing is lost",
			errdefs.ErrState, size.Format(sb.Size), size.Format(fi.Size()))
	}
	return err
}

// replay mounts a file's filesystem and unmounts it again.
func (c *copies) replay(f *os.File, fs *diskfs.Filesystem) error {
	return c.mounted(f, fs, "replay", func(*mount.Detached) error { return nil })
}

// mounted calls do with a file's filesystem mounted where nobody sees it. When it returns, the filesystem is
// unmounted, and everything is in the file. One that cannot be mounted returns [errdefs.ErrState].
func (c *copies) mounted(f *os.File, fs *diskfs.Filesystem, purpose string, do func(*mount.Detached) error) error {
	dev, err := c.devices.Nameless(f, purpose)
	if err != nil {
		return err
	}
	defer dev.Close()
	mnt, err := mount.New(mount.Config{
		FSType: fs.Name, Source: dev.Path(), Data: fs.MountData, Attr: mount.Attr{NoSUID: true, NoDev: true, NoExec: true},
	})
	if err != nil {
		return fmt.Errorf("%w: the filesystem cannot be mounted: %w; check the source with %s", errdefs.ErrState, err, fs.Checker)
	}
	err = do(mnt)
	if err := errors.Join(err, mnt.Close(), awaitUnmounted(dev)); err != nil {
		return err
	}
	return dev.Sync()
}

// awaitUnmounted waits until no filesystem is mounted from a device. Closing a mount's last descriptor unmounts it. But a
// process that is being started has copies of all descriptors until its program runs. If that lasts too long, the error is
// [errdefs.ErrUnderWay].
func awaitUnmounted(dev *loopdev.Device) error {
	for deadline := time.Now().Add(detached); ; time.Sleep(place.SettlePoll) {
		mounted, err := dev.InUse()
		if err != nil || !mounted {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%w: %s is still mounted %s after the plugin unmounted it, by a process that is being started; try again",
				errdefs.ErrUnderWay, dev.Path(), detached)
		}
	}
}
