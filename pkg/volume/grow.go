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
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// short reports whether the filesystem in an image could grow.
func (img *image) short() (bool, error) {
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return false, err
	}
	sb, err := fs.Identify(img.File)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, fmt.Errorf("%w: volume %s: %w; check %s with %s, or restore it from a snapshot", ErrState, img.ID, err, img.Name(), fs.Checker)
	}
	return err == nil && sb.Short(img.Spec.Size), err
}

// growInUse grows the filesystem of a volume that is mounted, if there is anything
// to grow. That its superblock cannot be made sense of may be due to the kernel,
// which is just writing it.
func (m *Manager) growInUse(img *image, rel string) error {
	if short, err := img.short(); err == nil && !short {
		return nil
	}
	if err := fsctl.MayGrow(img.Spec.Filesystem); err != nil {
		return fmt.Errorf("%w: volume %s has %d bytes now, but its filesystem cannot use them yet: %w; it grows when the volume is staged the next time: restart the pod, or run the plugin with that capability",
			ErrState, img.ID, img.Spec.Size, err)
	}
	at, err := m.openMounted(rel)
	if err != nil {
		return err
	}
	defer at.Close()
	if err = growMounted(img, at); !errors.Is(err, syscall.EROFS) {
		return err
	}
	// That mount is read-only. Another is not.
	mnt, err := m.mountImage(img, Access{})
	if err != nil {
		return err
	}
	defer mnt.Close()
	return growMounted(img, mnt.File())
}

// growMounted grows a filesystem through the root of a writable mount of it, open
// with O_PATH.
func growMounted(img *image, root *os.File) error {
	f, err := mount.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	return pool.Full(fsctl.Grow(f, img.Spec.Size))
}

// growUnmounted grows the filesystem of a volume that nobody has mounted, and
// returns the image that has it then. What somebody still has, as in another mount
// namespace, stays as it is, and so does what a full pool has no room to grow.
//
// It may take longer than the caller has time: [ErrUnderWay].
func (m *Manager) growUnmounted(ctx context.Context, img *image) (*image, error) {
	err := m.unused(img)
	if err != nil && !errors.Is(err, ErrState) {
		return nil, err
	}
	if err != nil || m.grow == nil {
		klog.InfoS("A filesystem that cannot grow here while it is mounted stays smaller than its volume", "volume", img.ID, "reason", err)
		return m.open(img.ID)
	}
	_, err = outlive(ctx, m, "growth of "+volumeKey(img.ID), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.growCopy(ctx, img.ID)
	})
	if errors.Is(err, pool.ErrFull) {
		klog.ErrorS(err, "A filesystem stays smaller than its volume", "volume", img.ID)
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return m.open(img.ID)
}

// growCopy puts a copy of an image with a larger filesystem in the image's place:
// a tool that is killed half-way leaves what nobody could mount.
func (m *Manager) growCopy(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, growLimit)
	defer cancel()
	img, err := m.openClaim(id)
	if err != nil {
		return err
	}
	defer img.Close()
	unlock, err := m.exclusive(ctx, img, settleTime)
	if err != nil {
		return err
	}
	defer unlock()
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return err
	}
	f, err := m.pool.NewVolume()
	if err != nil {
		return err
	}
	defer f.Close()
	larger := &image{File: f, Record: img.Record, fresh: true}
	if err := reflink.Clone(f, img.File); err != nil {
		return pool.Full(err)
	}
	if err := larger.resize(img.Spec.Size); err != nil {
		return pool.Full(err)
	}
	if err := m.growDevice(ctx, larger, fs); err != nil {
		// The tools say of a full pool what they say of a broken disk.
		if s, e := m.pool.Space(); e == nil && s.Available < growRoom {
			return fmt.Errorf("%w: growing the filesystem of volume %s: %w", pool.ErrFull, id, err)
		}
		return fmt.Errorf("%w: volume %s: %w; check %s with %s", ErrState, id, err, img.Name(), fs.Checker)
	}
	if err := pool.SetRecord(f, pool.VolumeAttr, larger.Record); err != nil {
		return err
	}
	return pool.Full(tmpfile.Replace(f, m.pool.Volume(id)))
}

const (
	// growLimit is for tools that hang: on an empty 8 TiB they take half a minute.
	growLimit = 30 * time.Minute

	// growRoom is less than what e2fsck and resize2fs write.
	growRoom = 4 * diskfs.MiB
)

// growDevice runs the filesystem's own tools on an image.
func (m *Manager) growDevice(ctx context.Context, img *image, fs *diskfs.Filesystem) error {
	dev, err := m.attachNew(img, loopdev.Options{AutoClear: true})
	if err != nil {
		return err
	}
	defer m.letGo(img, dev.Index())
	defer dev.Close()
	if err := m.grow(ctx, fs, dev.Path()); err != nil {
		return err
	}
	return dev.Sync()
}
