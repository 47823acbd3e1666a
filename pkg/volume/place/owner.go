// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Owner is the volume that a mount or a loop device may belong to: an open [image.Image],
// or a [Lost] volume, of which only the id is known.
type Owner interface {
	ID() string
	Mode() image.Mode
	// Owns reports whether an attached loop device is the volume's.
	Owns(dev *loopdev.Device) (bool, error)
}

// Lost is a volume whose image is gone, and its record with it. All that is known of it is
// what is still mounted or attached.
type Lost struct {
	id     string
	mode   image.Mode
	images *image.Store
}

// NewLost describes a volume without an image.
func NewLost(images *image.Store, id string, mode image.Mode) Lost { return Lost{id, mode, images} }

// Lost describes a volume without an image by what is mounted at a path.
func (r *Root) Lost(images *image.Store, id, rel string) (Lost, error) {
	lost := NewLost(images, id, image.ModeFilesystem)
	at, err := mount.OpenTarget(r.dir, rel, 0)
	if isPathError(err) {
		return lost, nil // no volume can be mounted there
	}
	if err != nil {
		return lost, err
	}
	defer at.Close()
	info, err := mount.Of(at)
	if err != nil || info == nil {
		return lost, err
	}
	if info.FSType == "tmpfs" && info.Source == DiskSource(id) {
		lost.mode = image.ModeDiskImage
	} else if fi, err := at.Stat(); err == nil && !fi.IsDir() {
		lost.mode = image.ModeBlock
	}
	return lost, nil
}

// ID is the volume's id.
func (l Lost) ID() string { return l.id }

// Mode is the form in which the volume was published.
func (l Lost) Mode() image.Mode { return l.mode }

// ReadyDevice is the name of a device whose image was attached before it became a volume: to rename
// it then would take longer than all the rest. Only inline volumes have such devices. No id of a
// volume looks like that.
const ReadyDevice = "(ready)"

// Owns reports whether an attached device was the volume's. The inode behind the device
// proves that its file was a volume of this pool and is none any more. Only then the
// device's name tells which volume it was. A pod that may write to a block volume may also
// rename its device (LOOP_SET_STATUS64 in drivers/block/loop.c), but it cannot remove the
// name of its own image. The name proves nothing if the id is too long to fit into it.
//
// A [ReadyDevice] was some inline volume's. That one is asked for by its only target, and what is
// mounted there has lost its image, so it is the one.
func (l Lost) Owns(dev *loopdev.Device) (bool, error) {
	info, err := dev.Info()
	if err != nil || info.Name != l.id && !(info.Name == ReadyDevice && l.mode == image.ModeFilesystem) || len(info.Name) >= loopdev.MaxName {
		return false, err
	}
	if was, err := l.images.WasVolume(dev.Index()); err != nil || !was {
		return false, err
	}
	ids, err := l.images.IDs()
	return err == nil && ids[image.FileID{Device: info.Device, Inode: info.Inode}] == "", err
}

var _, _ Owner = (*image.Image)(nil), Lost{}

// ErrForeign means that the mount at a target is not the volume's.
var ErrForeign = errors.New("not this volume's mount")
