// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/selinux"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// mounter mounts images.
type mounter struct {
	pool    *pool.Pool
	images  *image.Store
	root    *place.Root
	devices *device.Devices
}

// detached attaches an image and mounts the filesystem in it, at no path yet. Only the
// mount holds the loop device.
func (m mounter) detached(img *image.Image, access image.Access) (*mount.Detached, error) {
	dev, err := m.devices.Mountable(img)
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	mnt, err := onDevice(dev, img.Record.Spec.Filesystem, access)
	if err != nil {
		return nil, m.pool.FullIfNoRoom(fmt.Errorf("mounting volume %s: %w", img.ID(), err))
	}
	return mnt, nil
}

// onDevice mounts the filesystem on a device, at no path yet.
func onDevice(dev *loopdev.Device, filesystem string, access image.Access) (*mount.Detached, error) {
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		return nil, err
	}
	// A filesystem that became read-only and was unmounted cannot be mounted writable (EBUSY)
	// while a process that is being started has a copy of its last mount.
	for deadline := time.Now().Add(place.SettleTime); ; time.Sleep(place.SettlePoll) {
		mnt, err := mount.New(mount.Config{
			FSType: fs.Name, Source: dev.Path(), Data: slices.Concat(fs.MountData, access.Data()), Attr: access.Attr(),
		})
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return mnt, explainContext(err, access)
		}
	}
}

// checkContext returns [errdefs.ErrState] for an SELinux context on a node that has no SELinux. The
// kernel would refuse the mount, and only after the volume was made.
func checkContext(access image.Access) error {
	if access.Context == "" {
		return nil
	}
	enabled, err := selinux.Enabled()
	if err == nil && !enabled {
		err = fmt.Errorf("%w: mount option context (in mountOptions) %q: SELinux is not enabled in "+
			"the kernel of this node, so kubelet has not added the option; remove it from the mountOptions of the "+
			"StorageClass and the PersistentVolume", errdefs.ErrState, access.Context)
	}
	return err
}

// explainContext adds to the kernel's error of using an SELinux context what may have caused it.
func explainContext(err error, access image.Access) error {
	if access.Context == "" || !errors.Is(err, syscall.EINVAL) {
		return err
	}
	return fmt.Errorf("%w; the SELinux policy of this node may not know the context %s, or the filesystem is still "+
		"mounted with another one: see dmesg", err, access.Context)
}

// label gives the image of a disk.img the SELinux context that its pod has. There is one file, and
// so one label: a context that differs from that of a target which has the volume returns
// [errdefs.ErrState].
func (m mounter) label(img *image.Image, context string) error {
	if context == "" {
		return nil
	}
	has, err := selinux.Label(img.File)
	if err != nil || has == context {
		return err
	}
	users, err := m.root.Mountpoints(img)
	if err != nil {
		return err
	}
	if len(users) > 0 {
		return fmt.Errorf("%w: volume %s is published at %s, and its disk.img has the SELinux context %q, not %q; "+
			"unpublish it there first", errdefs.ErrState, img.ID(), users[0], has, context)
	}
	return img.Label(context)
}

// disk binds an image to disk.img in a tmpfs at the target. The tmpfs has room for the
// two inodes it needs and for no data, so a pod can put nothing beside the disk. For the pod
// the image is an ordinary file, which it may make larger: until it has reached its bound, or,
// where the kernel keeps none, until the pool is full.
func (m mounter) disk(img *image.Image, target *os.File, rel string, access image.Access) error {
	if err := m.pool.Check(); err != nil { // in another pool the path would name another image
		return err
	}
	if err := m.images.Bound(img); errors.Is(err, pool.ErrProjectTaken) {
		logs.Warn("The kernel does not bound the space of a disk.img", "err", err, "volume", img.ID())
	} else if err != nil {
		return err
	}
	attr := mount.Attr{NoSUID: true, NoDev: true, NoExec: true, ReadOnly: access.ReadOnly}
	dir, err := mount.New(mount.Config{
		FSType: "tmpfs",
		Source: place.DiskSource(img.ID()),
		Data:   slices.Concat([]string{"size=4096", "nr_inodes=2", "mode=0755"}, access.Data()),
		Attr:   mount.Attr{NoSUID: true, NoDev: true, NoExec: true},
	})
	if err != nil {
		return explainContext(err, access)
	}
	defer dir.Close()
	if err := m.label(img, access.Context); err != nil {
		return explainContext(err, access)
	}
	point, err := openat.Create(dir.File(), image.DiskName)
	if err != nil {
		return err
	}
	defer point.Close()
	// Open the image again, by its name: the kernel does not mount a file that was opened
	// unnamed, even once it has a name (move_mount returns ENOENT on 6.18).
	named, err := os.OpenFile(m.pool.Volume(img.ID()), os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer named.Close()
	file, err := mount.Clone(named)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := errors.Join(file.SetAttr(attr), dir.SetAttr(attr)); err != nil {
		return err
	}
	if err := dir.Attach(target); err != nil {
		return err
	}
	if err := file.Attach(point); err != nil {
		point.Close() // while it is open, the tmpfs is busy
		dir.Close()
		return errors.Join(err, m.root.UnmountTop(rel))
	}
	return nil
}
