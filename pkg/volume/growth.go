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

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// growInUse grows the filesystem of a claim that is mounted, if there is anything to grow. A
// superblock that makes no sense may be the kernel's doing, which is just writing it.
func (m *Manager) growInUse(img *image.Image, rel string) error {
	if grown, err := img.Grown(); err == nil && grown {
		return nil
	}
	if err := fsctl.MayGrow(img.Record.Spec.Filesystem); err != nil {
		return fmt.Errorf("%w: volume %s has %s now, but its filesystem cannot use them yet: %w; it grows when the volume is staged the next time: restart the pod, or run the plugin with that capability",
			errdefs.ErrState, img.ID(), size.Format(img.Record.Spec.Size), err)
	}
	at, err := m.root.OpenMounted(rel)
	if err != nil {
		return err
	}
	defer at.Close()
	if err = growMounted(img, at); !errors.Is(err, syscall.EROFS) {
		return err
	}
	// That mount is read-only. Another one is not.
	mnt, err := m.mountDetached(img, image.Access{})
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

// growUnmounted grows the filesystem of a claim that is not mounted, and returns the image
// that has it then. A filesystem that somebody still has mounted, as in another mount
// namespace, stays as it is, and so does one that a full pool has no room to grow.
//
// It may take longer than the caller has time: [errdefs.ErrUnderWay].
func (m *Manager) growUnmounted(ctx context.Context, img *image.Image) (*image.Image, error) {
	err := m.root.CheckUnused(img)
	if err != nil && !errors.Is(err, errdefs.ErrState) {
		return nil, err
	}
	if err != nil || m.grow == nil {
		klog.InfoS("A filesystem that cannot grow here while it is mounted stays smaller than its volume", "volume", img.ID(), "reason", err)
		return m.images.Open(img.ID())
	}
	_, err = outlive(ctx, &m.work, "growth of "+image.VolumeKey(img.ID()), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.growCopy(ctx, img.ID())
	})
	if errors.Is(err, pool.ErrFull) {
		klog.ErrorS(err, "A filesystem stays smaller than its volume", "volume", img.ID())
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return m.images.Open(img.ID())
}

// growCopy puts a copy of an image with a larger filesystem in the image's place. A tool
// that is killed half-way leaves a filesystem that nobody could mount, so it never works on
// the image itself, and an interrupted grow has no effect.
func (m *Manager) growCopy(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, growLimit)
	defer cancel()
	img, err := m.images.OpenClaim(id)
	if err != nil {
		return err
	}
	defer img.Close()
	unlock, err := m.images.Exclusive(ctx, img, place.SettleTime)
	if err != nil {
		return err
	}
	defer unlock()
	fs, err := diskfs.Lookup(img.Record.Spec.Filesystem)
	if err != nil {
		return err
	}
	f, err := m.images.New()
	if err != nil {
		return err
	}
	defer f.Close()
	larger := &image.Image{File: f, Record: img.Record, Fresh: true}
	if err := reflink.Clone(f, img.File); err != nil {
		return pool.Full(err)
	}
	if err := img.Record.Provisioning.Resize(f, img.Record.Spec.Size); err != nil {
		return pool.Full(err)
	}
	if err := m.growDevice(ctx, larger, fs); err != nil {
		// The tools say of a full pool what they say of a broken disk.
		if s, e := m.pool.Space(); e == nil && s.Available < growRoom {
			return fmt.Errorf("%w: growing the filesystem of volume %s: %w", pool.ErrFull, id, err)
		}
		return fmt.Errorf("%w: volume %s: %w; check %s with %s", errdefs.ErrState, id, err, img.Path(), fs.Checker)
	}
	return m.images.Replace(img, f)
}

const (
	// growLimit is for tools that hang: on an empty 8 TiB they take half a minute.
	growLimit = 30 * time.Minute

	// growRoom is less than what e2fsck and resize2fs write.
	growRoom = 4 * diskfs.MiB
)

// growDevice runs the filesystem's own tools on an image.
func (m *Manager) growDevice(ctx context.Context, img *image.Image, fs *diskfs.Filesystem) error {
	dev, err := m.devices.Private(img)
	if err != nil {
		return err
	}
	defer device.LetGo(img, dev.Index())
	defer dev.Close()
	if err := m.grow(ctx, fs, dev.Path()); err != nil {
		return err
	}
	return dev.Sync()
}
