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

	"github.com/google/uuid"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// image is a volume's open file and what it says of itself.
type image struct {
	*os.File
	Record
	fresh bool // made by this call
}

// open opens the image of a volume. It is ErrNotFound if there is none.
func (m *Manager) open(id string) (*image, error) {
	f, err := os.OpenFile(m.pool.Volume(id), os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	img := &image{File: f}
	if err := pool.GetRecord(f, pool.VolumeAttr, &img.Record); err != nil {
		f.Close()
		if !errors.Is(err, pool.ErrNoRecord) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w; the file is not one of ours: move it away", ErrState, err)
	}
	if img.Version != recordVersion || img.ID != id {
		f.Close()
		return nil, fmt.Errorf("%w: %s: its record is of version %d and volume %q; this plugin writes version %d: upgrade the plugin or move the file away",
			ErrState, f.Name(), img.Version, img.ID, recordVersion)
	}
	return img, nil
}

// create makes the image of a new volume: a clone of its template with an
// identity of its own. It has no name yet, and is gone with its descriptor.
func (m *Manager) create(ctx context.Context, r Request) (*image, Result, error) {
	t, err := m.templates.Ensure(ctx, r.Spec)
	if err != nil {
		return nil, Result{}, err
	}
	defer t.Close()
	f, err := m.pool.NewVolume()
	if err != nil {
		return nil, Result{}, err
	}
	img := &image{File: f, Record: r.record(), fresh: true}
	img.Template = t.Key
	img.UUID = uuid.New()
	img.Created = time.Now().UTC()
	if err := clone(img, t.File); err != nil {
		f.Close()
		return nil, Result{}, pool.Full(fmt.Errorf("volume %s from template %s: %w", r.ID, t.Key, err))
	}
	return img, Result{Template: t.Key, TemplateHit: t.Hit}, nil
}

func clone(img *image, from *os.File) error {
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return err
	}
	if err := reflink.Clone(img.File, from); err != nil {
		return err
	}
	// Before anyone can mount it: a kernel refuses, or confuses, two filesystems
	// with one UUID. Blocks are built from the template's, which are in memory.
	if err := fs.NewIdentity(from, img.File, img.UUID); err != nil {
		return err
	}
	if err := pool.SetRecord(img.File, pool.VolumeAttr, img.Record); err != nil {
		return err
	}
	if img.Mode == ModeDiskImage {
		// What has a name is whole, even after a power cut. Attaching a loop device
		// does this for the others, before anything is mounted.
		return img.Sync()
	}
	return nil
}

// torn reports whether a power cut has taken part of an image that had its name
// and was not shown to anybody yet. Its record is there, its content is not.
func (img *image) torn() (bool, error) {
	dev, err := loopdev.OpenBacked(img.File)
	if err == nil { // attached, and so synced
		return false, dev.Close()
	}
	if !errors.Is(err, loopdev.ErrNotAttached) {
		return false, err
	}
	fi, err := img.Stat()
	if err != nil {
		return false, err
	}
	if img.Mode == ModeDiskImage || fi.Size() != img.Spec.Size { // what is in a disk image is the VM's affair
		return fi.Size() < img.Spec.Size, nil
	}
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return false, err
	}
	sb, err := fs.Identify(img.File)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, fmt.Errorf("%w: volume %s: %w; what it held is lost: delete the pod", ErrState, img.ID, err)
	}
	return err == nil && sb.UUID != img.UUID, err
}

// link gives the image its name. From here on the volume exists.
func (m *Manager) link(img *image) error {
	return pool.Full(tmpfile.Link(img.File, m.pool.Volume(img.ID)))
}

// unlink takes the name away again.
func (m *Manager) unlink(id string) error {
	if err := os.Remove(m.pool.Volume(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
