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

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Result tells how a request was met.
type Result struct {
	Template    string // key; "" if no template was asked for
	TemplateHit bool
	Existed     bool // the volume was there already
}

// create makes the image of a new volume, with the content and the identity that
// its record asks for. It has no name yet, and is gone with its descriptor.
func (m *Manager) create(ctx context.Context, r Record) (*image, Result, error) {
	f, err := m.pool.NewVolume()
	if err != nil {
		return nil, Result{}, err
	}
	r.Version, r.Created = recordVersion, time.Now().UTC()
	img := &image{File: f, Record: r, fresh: true}
	res, err := m.fill(ctx, img)
	if err == nil {
		err = pool.SetRecord(f, pool.VolumeAttr, img.Record)
	}
	if err != nil {
		f.Close()
		return nil, res, pool.Full(fmt.Errorf("volume %s: %w", r.ID, err))
	}
	return img, res, nil
}

// fill makes an empty file what its record says.
func (m *Manager) fill(ctx context.Context, img *image) (Result, error) {
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	switch {
	case err != nil:
		return Result{}, err
	case img.Source != Source{}:
		return Result{}, m.fillFromSource(ctx, img)
	case !fs.Formatted():
		return Result{}, img.resize(img.Spec.Size)
	}
	t, err := m.templates.Ensure(ctx, img.Spec)
	if err != nil {
		return Result{}, err
	}
	defer t.Close()
	img.Template = t.Key
	img.UUID = uuid.New()
	res := Result{Template: t.Key, TemplateHit: t.Hit}
	if err := img.copyFrom(ctx, t.File); err != nil {
		return res, fmt.Errorf("from template %s: %w", t.Key, err)
	}
	// Before anyone can mount it: a kernel refuses, or confuses, two filesystems
	// with one UUID. Blocks are built from the template's, which are in memory.
	return res, fs.NewIdentity(t.File, img.File, img.UUID)
}

// fillFromSource makes an empty file what its source holds at this moment.
func (m *Manager) fillFromSource(ctx context.Context, img *image) error {
	if err := m.take(ctx, img); err != nil {
		return fmt.Errorf("from %s: %w", img.Source, err)
	}
	if err := img.resize(img.Spec.Size); err != nil {
		return err
	}
	if img.Mode != ModeFilesystem {
		return nil // its content is its consumer's affair, to the last byte
	}
	img.UUID = uuid.New()
	if err := m.newIdentity(img.File, img.Spec.Filesystem, img.UUID); err != nil {
		return fmt.Errorf("from %s: %w", img.Source, err)
	}
	return nil
}

// take makes an empty image hold what its source holds at one moment.
func (m *Manager) take(ctx context.Context, img *image) error {
	if img.Source.Snapshot != "" {
		snap, err := m.openSnapshot(img.Source.Snapshot)
		if err != nil {
			return err
		}
		defer snap.Close()
		if err := snap.whole(); err != nil {
			return err
		}
		return img.copyFrom(ctx, snap.File)
	}
	vol, err := m.openClaim(img.Source.Volume)
	if err != nil {
		return err
	}
	defer vol.Close()
	if err := vol.whole(); err != nil {
		return err
	}
	if vol.Spec.Size > img.Spec.Size {
		return fmt.Errorf("%w: it has grown to %d bytes meanwhile; try again", ErrUnderWay, vol.Spec.Size)
	}
	if !vol.Thick && !img.Thick {
		return m.cloneLive(ctx, vol, img.File)
	}
	return m.copyLive(ctx, vol, func(still *os.File) error {
		if img.Thick {
			return img.copyFrom(ctx, still)
		}
		return copyAll(ctx, img.File, still)
	})
}

// copyLive has a volume copied, as it is at one moment, and shares nothing with it
// once that is done: what a thick volume shares, its next write would need new space
// for. Copying takes its time, and so is of something that stands still.
func (m *Manager) copyLive(ctx context.Context, vol *image, copy func(still *os.File) error) error {
	still, err := m.pool.NewVolume()
	if err != nil {
		return err
	}
	defer still.Close()
	if err := m.cloneLive(ctx, vol, still); err != nil {
		return err
	}
	return copy(still)
}

// copyAll makes an empty file the copy of another, as sparse as that.
func copyAll(ctx context.Context, dst, src *os.File) error {
	fi, err := src.Stat()
	if err != nil {
		return err
	}
	if err := dst.Truncate(fi.Size()); err != nil {
		return err
	}
	return sparse.Copy(ctx, dst, src)
}

// copyFrom gives an empty image the content of src: shared extents, or an own
// copy in reserved space.
func (img *image) copyFrom(ctx context.Context, src *os.File) error {
	if !img.Thick {
		return reflink.Clone(img.File, src)
	}
	if err := sparse.Reserve(img.File, img.Spec.Size); err != nil {
		return err
	}
	return sparse.Copy(ctx, img.File, src)
}

// resize makes an image larger, and never smaller. Of a thick one, the space that
// is missing is reserved.
func (img *image) resize(size int64) error {
	if img.Thick {
		return sparse.Reserve(img.File, size)
	}
	fi, err := img.Stat()
	if err != nil || fi.Size() >= size {
		return err
	}
	if err := failpoint.Before("ftruncate"); err != nil {
		return err
	}
	return img.Truncate(size)
}

// newIdentity gives the filesystem in an unmounted file the UUID id. One whose
// journal waits for replay, as a frozen xfs always does, is mounted for that,
// where nobody sees it.
func (m *Manager) newIdentity(f *os.File, filesystem string, id uuid.UUID) error {
	fs, err := diskfs.Lookup(filesystem)
	if err != nil {
		return err
	}
	err = fs.NewIdentity(f, f, id)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return fmt.Errorf("%w: %w; check the source with %s", ErrState, err, fs.Checker)
	}
	if !errors.Is(err, diskfs.ErrUnclean) {
		return err
	}
	if err := m.replay(f, fs); err != nil {
		return fmt.Errorf("%w: the journal cannot be replayed: %w; check the source with %s", ErrState, err, fs.Checker)
	}
	return fs.NewIdentity(f, f, id)
}

// replay mounts a file's filesystem and unmounts it again.
func (m *Manager) replay(f *os.File, fs *diskfs.Filesystem) error {
	dev, err := m.loops.Attach(f, loopdev.Options{AutoClear: true, Name: "replay"})
	if err != nil {
		return err
	}
	defer dev.Close()
	mnt, err := mount.New(mount.Config{
		FSType: fs.Name, Source: dev.Path(), Data: fs.MountData, Attr: mount.Attr{NoSUID: true, NoDev: true, NoExec: true},
	})
	if err != nil {
		return err
	}
	if err := mnt.Close(); err != nil { // this unmounts it, and returns when that is done
		return err
	}
	return dev.Sync()
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
	if img.Lifecycle == Persistent || img.Mode == ModeDiskImage {
		// It was synced before it had its name, and the one thing that may still be
		// missing is all of it: see tmpfile.Publish. Whatever else looks odd is its
		// user's doing, and is not touched.
		return fi.Size() == 0, nil
	}
	if fi.Size() != img.Spec.Size {
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

// unlink takes a volume's name away.
func (m *Manager) unlink(id string) error {
	if err := m.pool.RemoveVolume(id); err != nil {
		return err
	}
	m.ledger.forget(id)
	return nil
}
