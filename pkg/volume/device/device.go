// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package device manages the loop devices of volumes: it attaches, keeps, resizes, detaches
// and retires them.
//
// A filesystem's device detaches itself when its last user closes it, so only the mount
// holds it. The device of a block volume stays attached until the volume is unstaged, since
// a bind mount of a device node does not keep the device open. The inode behind a device
// tells whose it is.
//
// Sources: loop(4); drivers/block/loop.c for LO_FLAGS_AUTOCLEAR and discards.
package device

import (
	"errors"
	"fmt"
	"os"
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// Devices attaches the images of a pool. It may be used by several goroutines.
type Devices struct {
	pool   *pool.Pool
	images *image.Store
	loops  loopdev.Allocator
}

// New returns the Devices of a pool.
func New(p *pool.Pool, images *image.Store) *Devices { return &Devices{pool: p, images: images} }

// Mountable returns a loop device from which the image's filesystem can be mounted: the one
// that the image has, or a new one that detaches itself when its last user closes it.
func (d *Devices) Mountable(img *image.Image) (*loopdev.Device, error) {
	if !img.Fresh { // a fresh image has none, so do not search
		dev, err := loopdev.OpenBacked(img.File)
		if err == nil {
			return prepared(dev, img, loopdev.Options{})
		}
		if !errors.Is(err, loopdev.ErrNotAttached) {
			return nil, err
		}
	}
	return d.attach(img, loopdev.Options{AutoClear: true})
}

// Private attaches an image that nothing else has attached, until the device is closed.
func (d *Devices) Private(img *image.Image) (*loopdev.Device, error) {
	return d.attach(img, loopdev.Options{AutoClear: true})
}

// Nameless attaches a file that is not a volume yet, until the device is closed.
func (d *Devices) Nameless(f *os.File, purpose string) (*loopdev.Device, error) {
	return d.loops.Attach(f, loopdev.Options{AutoClear: true, Name: purpose})
}

// Ready attaches an image that has no record yet, to a device that is detached when its last user
// goes. With dropFlushes it is one for a volatile volume.
func (d *Devices) Ready(f *os.File, dropFlushes bool) (*loopdev.Device, error) {
	return d.loops.Attach(f, loopdev.Options{AutoClear: true, Name: place.ReadyDevice, DropFlushes: dropFlushes})
}

// Block returns the loop device of a block volume, and attaches the volume if need be. The
// device stays attached when it is closed.
//
// A reader beside a writer has a device of its own, and so a page cache of its own. It may
// not see changes of data that it has read once.
func (d *Devices) Block(img *image.Image, readOnly bool) (*loopdev.Device, error) {
	// Most often a known device fits. Only if there is none whatsoever, the image may get one more.
	for _, find := range []func(*os.File) ([]int, error){loopdev.Known, loopdev.Find} {
		loops, err := find(img.File)
		if err != nil {
			return nil, err
		}
		if dev, err := attached(img, loops, readOnly); err != nil || dev != nil {
			return dev, err
		}
	}
	d.images.Refill(img)
	return d.attach(img, loopdev.Options{ReadOnly: readOnly})
}

// attached returns the one of a block volume's loop devices that is read-only or not, as is
// asked for, or nil if there is none.
func attached(img *image.Image, loops []int, readOnly bool) (*loopdev.Device, error) {
	for _, index := range loops {
		dev, err := loopdev.Open(index)
		if errors.Is(err, loopdev.ErrNotAttached) {
			continue
		}
		if err != nil {
			return nil, err
		}
		is, err := dev.ReadOnly()
		if err == nil && is == readOnly {
			// Somebody may have had the device open at an earlier unstage. The kernel would
			// then detach it when they close it, under the next pod: Keep prevents that. The
			// image may also have grown since.
			if err = errors.Join(dev.Keep(), dev.UpdateSize()); err == nil {
				return prepared(dev, img, loopdev.Options{ReadOnly: readOnly})
			}
		}
		dev.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// prepared returns a device that an image has already, in the state that the volume needs, or
// closes it.
func prepared(dev *loopdev.Device, img *image.Image, o loopdev.Options) (*loopdev.Device, error) {
	if err := dev.Prepare(img.Record.Device(o)); err != nil {
		dev.Close()
		return nil, fmt.Errorf("volume %s: %w", img.ID(), err)
	}
	return dev, nil
}

func (d *Devices) attach(img *image.Image, o loopdev.Options) (*loopdev.Device, error) {
	if err := d.pool.Check(); err != nil {
		return nil, err
	}
	o.Name = img.ID()
	dev, err := d.loops.Attach(img.File, img.Record.Device(o))
	if err != nil {
		return nil, d.pool.FullIfNoRoom(fmt.Errorf("attaching volume %s: %w", img.ID(), err))
	}
	return dev, nil
}

// GiveBack makes the device of a volume that is about to end pass flushes on, so that the next
// program that takes the device finds it so. -1 means none.
func GiveBack(img *image.Image, index int) error {
	if index < 0 || !img.Record.Durability.DropsFlushes() {
		return nil
	}
	return Restore(img.File, index)
}

// Restore makes the device of a file pass flushes on. A device that the file does not have any more
// stays as it is.
func Restore(f *os.File, index int) error {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	ours, err := dev.Backs(f)
	if err == nil && ours {
		err = dev.Prepare(loopdev.Options{})
	}
	return errors.Join(err, dev.Close())
}

// UpdateSize makes all loop devices of an image as large as the image.
func UpdateSize(img *image.Image) error {
	loops, err := loopdev.Known(img.File)
	if err != nil {
		return err
	}
	for _, index := range loops {
		dev, err := loopdev.Open(index)
		if errors.Is(err, loopdev.ErrNotAttached) {
			continue
		}
		if err != nil {
			return err
		}
		ours, err := img.Owns(dev)
		if err == nil && ours {
			err = dev.UpdateSize()
		}
		if err := errors.Join(err, dev.Close()); err != nil {
			return err
		}
	}
	return nil
}

// Detach detaches those of the given loop devices that are the volume's.
func Detach(v place.Owner, loops []int) error {
	for _, index := range loops {
		if err := detach(v, index); err != nil {
			return err
		}
	}
	return nil
}

func detach(v place.Owner, index int) error {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	if ours, err := v.Owns(dev); err != nil || !ours {
		return errors.Join(err, dev.Close())
	}
	if err := dev.Sync(); err != nil {
		dev.Close()
		return fmt.Errorf("volume %s: %w", v.ID(), err)
	}
	if err := dev.Detach(); err != nil && !errors.Is(err, loopdev.ErrNotAttached) {
		return err
	}
	LetGo(v, index)
	return nil
}

// LetGo is called with the device of a volume that was unmounted or detached; -1 means none.
// It logs if something else still holds the device, for example a copy of the mount in
// another mount namespace. The volume's space is freed when that ends.
func LetGo(v place.Owner, index int) {
	if index < 0 {
		return
	}
	provisioning := image.Thin
	if img, known := v.(*image.Image); known {
		provisioning = img.Record.Provisioning
	}
	held, err := place.Backs(index, v)
	for deadline := time.Now().Add(place.SettleTime); provisioning.RetiresDevices() && err == nil && held && time.Now().Before(deadline); {
		time.Sleep(place.SettlePoll)
		held, err = place.Backs(index, v)
	}
	if err == nil && held {
		logs.Warn("Something still holds an unmounted volume, for example a copy of its mount in another mount namespace; its space is freed when that ends",
			"volume", v.ID(), "loopDevice", index)
		return
	}
	if err == nil {
		err = provisioning.Retire(index)
	}
	if err != nil {
		klog.ErrorS(err, "A loop device of an unmounted volume cannot be checked or removed", "volume", v.ID(), "loopDevice", index)
	}
}
