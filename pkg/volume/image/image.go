// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package image

import (
	"errors"
	"fmt"
	"os"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
)

// Image is a volume's open file and its record.
type Image struct {
	File   *os.File
	Record Record
	Fresh  bool // made by this call: it has no loop device yet, and nobody else has it
	Synced bool // its content was made ahead, and was durable before it got its record
}

// ID is the volume's id.
func (img *Image) ID() string { return img.Record.ID }

// Mode is the form in which the volume is published.
func (img *Image) Mode() Mode { return img.Record.Mode }

// Path is where the image is in the pool.
func (img *Image) Path() string { return img.File.Name() }

// Close closes the file. An image without a name ends with that.
func (img *Image) Close() error { return img.File.Close() }

// Owns reports whether the image is the file behind a loop device, by its inode. The name of
// a device proves nothing.
func (img *Image) Owns(dev *loopdev.Device) (bool, error) { return dev.Backs(img.File) }

// Is reports whether a file is the image.
func (img *Image) Is(f *os.File) (bool, error) {
	a, errA := img.File.Stat()
	b, errB := f.Stat()
	if err := errors.Join(errA, errB); err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// Allocated is the space that the image takes of the pool, in bytes, shared extents
// included.
func (img *Image) Allocated() (int64, error) { return Allocated(img.File) }

// CheckLength returns [errdefs.ErrState] if the image is shorter than its record says. A
// disk.img may have any length: its pod may shorten it, for example by copying another image
// over it.
func (img *Image) CheckLength() error {
	return checkLength(img.File, img.Mode(), img.Record.Spec.Size, "volume "+img.ID(), "restore it from a snapshot, or delete it")
}

// smallestDisk is the size of the smallest disk that there is, in bytes.
const smallestDisk = size.MiB

// Emptied reports whether the image is a disk.img that has lost its disk: its pod made it shorter
// than any disk is. A program that writes an image anew cuts the old one to nothing first.
func (img *Image) Emptied() (bool, error) {
	if img.Mode() != ModeDiskImage {
		return false, nil
	}
	fi, err := img.File.Stat()
	return err == nil && fi.Size() < smallestDisk, err
}

// CheckSource returns [errdefs.ErrState] if no copy may be made of the image: it is too short
// ([Image.CheckLength]), or an emptied disk.img, whose copy would be zeros from begin to end.
//
// A disk.img that is only shorter than its record is copied. It may be whole, if its pod copied a
// smaller image over it. If its end was cut, the copy saves what is left.
func (img *Image) CheckSource() error {
	if err := img.CheckLength(); err != nil {
		return err
	}
	if emptied, err := img.Emptied(); err != nil || !emptied {
		return err
	}
	return fmt.Errorf("%w: volume %s: its pod emptied the disk.img, so there is nothing to copy; restore an earlier snapshot, "+
		"or let the pod write a disk into it, and try again", errdefs.ErrState, img.ID())
}

// Grown reports whether the filesystem in the image is as large as it can be there.
func (img *Image) Grown() (bool, error) {
	fs, err := diskfs.Lookup(img.Record.Spec.Filesystem)
	if err != nil {
		return false, err
	}
	sb, err := fs.Identify(img.File)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, fmt.Errorf("%w: volume %s: %w; check %s with %s, or restore it from a snapshot", errdefs.ErrState, img.ID(), err, img.Path(), fs.Checker)
	}
	return err == nil && !sb.Short(img.Record.Spec.Size), err
}

// Torn reports whether a power cut has taken content of an image that had its name, but that
// no call had returned yet. Such an image has its record, and lacks its content.
func (img *Image) Torn() (bool, error) {
	dev, err := loopdev.OpenBacked(img.File)
	if err == nil { // attaching has synced it
		return false, dev.Close()
	}
	if !errors.Is(err, loopdev.ErrNotAttached) {
		return false, err
	}
	fi, err := img.File.Stat()
	if err != nil {
		return false, err
	}
	r := img.Record
	if r.Lifecycle == Claim || r.Mode == ModeDiskImage {
		// The image was synced before it got its name, so it has either all of its content
		// or none: see tmpfile.Publish. Its user may have done anything else to it.
		return fi.Size() == 0, nil
	}
	if fi.Size() != r.Spec.Size {
		return fi.Size() < r.Spec.Size, nil
	}
	fs, err := diskfs.Lookup(r.Spec.Filesystem)
	if err != nil {
		return false, err
	}
	sb, err := fs.Identify(img.File)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, fmt.Errorf("%w: volume %s: %w; its content is lost: delete the pod", errdefs.ErrState, r.ID, err)
	}
	return err == nil && sb.UUID != r.UUID, err
}

// Snapshot is a snapshot's open file and its record.
type Snapshot struct {
	File   *os.File
	Record SnapshotRecord
}

// Close closes the file.
func (s *Snapshot) Close() error { return s.File.Close() }

// CheckLength returns [errdefs.ErrState] if the snapshot is shorter than its record says.
func (s *Snapshot) CheckLength() error {
	return checkLength(s.File, s.Record.Mode, s.Record.Spec.Size, "snapshot "+s.Record.ID, "delete it")
}

func checkLength(f *os.File, mode Mode, want int64, what, remedy string) error {
	fi, err := f.Stat()
	if err != nil || mode == ModeDiskImage {
		return err
	}
	if fi.Size() < want {
		return fmt.Errorf("%w: %s: its image has only %s of its %s: the rest is lost; %s", errdefs.ErrState, what, size.Format(fi.Size()), size.Format(want), remedy)
	}
	return nil
}
