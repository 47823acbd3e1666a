// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// growth makes the filesystems in images larger.
type growth struct {
	images *image.Store
	mounts mounter
	work   *background
	tool   func(ctx context.Context, fs *diskfs.Filesystem, device string) error // Config.GrowFilesystem
}

// inUse grows the mounted filesystem of a claim, if it is smaller than its volume. It
// goes on if the superblock cannot be read: the kernel may be writing it just then.
func (g growth) inUse(img *image.Image, rel string) error {
	if grown, err := img.Grown(); err == nil && grown {
		return nil
	}
	if err := fsctl.MayGrow(img.Record.Spec.Filesystem); err != nil {
		return fmt.Errorf("%w: volume %s has %s now, but its filesystem cannot use all of it yet: %w; the filesystem grows when the volume is staged the next time: restart the pod, or run the plugin with that capability",
			errdefs.ErrState, img.ID(), size.Format(img.Record.Spec.Size), err)
	}
	at, err := g.mounts.root.OpenMounted(rel)
	if err != nil {
		return err
	}
	defer at.Close()
	if err = growMounted(img, at); !errors.Is(err, syscall.EROFS) {
		return err
	}
	// That mount is read-only, so grow through a writable one. The kernel refuses a second mount with
	// another SELinux context than the first one has.
	there, err := g.mounts.root.Identify(img, rel)
	if err != nil {
		return err
	}
	mnt, err := g.mounts.detached(img, image.Access{Context: there.Access.Context})
	if err != nil {
		return err
	}
	defer mnt.Close()
	return growMounted(img, mnt.File())
}

// growMounted grows a filesystem through the root of a writable mount of it, open with
// O_PATH.
func growMounted(img *image.Image, root *os.File) error {
	f, err := mount.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	return pool.Full(fsctl.Grow(f, img.Record.Spec.Size))
}

// unmounted grows the filesystem of a claim that is not mounted, and opens the image
// that has it then. The filesystem stays as it is if somebody still has it mounted, for
// example in another mount namespace, or if the pool is too full to grow it.
//
// If it takes longer than the caller has time, it returns [errdefs.ErrUnderWay].
func (g growth) unmounted(ctx context.Context, img *image.Image) (*image.Image, error) {
	err := g.mounts.root.CheckUnused(img)
	if err != nil && !errors.Is(err, errdefs.ErrState) {
		return nil, err
	}
	if err != nil || g.tool == nil {
		logs.Warn("A filesystem cannot grow here while it is mounted, and stays smaller than its volume", "volume", img.ID(), "reason", err)
		return g.images.Open(img.ID())
	}
	_, err = outlive(ctx, g.work, "growing the filesystem of volume "+img.ID(), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, g.onCopy(ctx, img.ID())
	})
	if errors.Is(err, pool.ErrFull) {
		logs.Warn("A filesystem stays smaller than its volume", "err", err, "volume", img.ID())
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return g.images.Open(img.ID())
}

// onCopy copies an image, grows the filesystem in the copy, and puts the copy in the
// image's place. So an interrupted grow has no effect. A tool that is killed half-way may
// leave a filesystem that nobody can mount, and must not work on the image itself.
func (g growth) onCopy(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, growLimit)
	defer cancel()
	img, err := g.images.OpenClaim(id)
	if err != nil {
		return err
	}
	defer img.Close()
	unlock, err := g.images.Exclusive(ctx, img, place.SettleTime)
	if err != nil {
		return err
	}
	defer unlock()
	fs, err := diskfs.Lookup(img.Record.Spec.Filesystem)
	if err != nil {
		return err
	}
	f, err := g.images.New()
	if err != nil {
		return err
	}
	defer f.Close()
	larger := &image.Image{File: f, Record: img.Record, Fresh: true}
	if err := reflink.Clone(f, img.File); err != nil {
		return pool.Full(err)
	}
	// The tool makes the filesystem as large as the file, and the volume is as large as its
	// record says.
	if err := sparse.SetLength(f, img.Record.Spec.Size); err != nil {
		return pool.Full(err)
	}
	if err := g.images.Extend(img.Record.Provisioning, f, img.Record.Spec.Size); err != nil {
		return pool.Full(err)
	}
	if err := g.onDevice(ctx, larger, fs); err != nil {
		// The tools report the same error for a full pool as for a broken disk.
		if s, e := g.mounts.pool.Space(); e == nil && s.Available < growRoom {
			return fmt.Errorf("%w: growing the filesystem of volume %s: %w", pool.ErrFull, id, err)
		}
		return fmt.Errorf("%w: volume %s: %w; check %s with %s", errdefs.ErrState, id, err, img.Path(), fs.Checker)
	}
	return g.images.Replace(img, f)
}

const (
	// growLimit ends tools that hang. On an empty 8 TiB they take half a minute.
	growLimit = 30 * time.Minute

	// growRoom is less than e2fsck and resize2fs write: a pool with less is full for them.
	growRoom = 4 * diskfs.MiB
)

// onDevice runs the filesystem's own tools on an image.
func (g growth) onDevice(ctx context.Context, img *image.Image, fs *diskfs.Filesystem) error {
	dev, err := g.mounts.devices.Private(img)
	if err != nil {
		return err
	}
	defer device.LetGo(img, dev.Index())
	defer dev.Close()
	if err := g.tool(ctx, fs, dev.Path()); err != nil {
		return err
	}
	return dev.Sync()
}
