// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"os"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

const (
	// worthTrimming is how much space a filesystem must have left unused, in bytes, before it
	// is trimmed. Files of a few MiB come and go, and their space is soon used again.
	worthTrimming = 32 * size.MiB

	// leastTrim is the smallest range that is returned, in bytes. Each range becomes a hole in
	// the image, and each hole makes cloning the image slower by 10 to 20 µs.
	leastTrim = 64 * size.KiB

	// trimPart is how much of a filesystem is trimmed at a time, in bytes. Meanwhile other
	// operations on the volume are refused, and the plugin does not end.
	trimPart = 4 * size.GiB
)

// trims remembers what was trimmed.
type trims struct {
	volumes map[string]trim // by id
	pool    trim
	failed  logs.Repeats
}

type trim struct {
	kept  int64 // bytes that trimming could not return: a filesystem keeps some for itself, such as its log
	tries int   // how often trimming returned less than expected
}

// patience is how often a filesystem that keeps more than before is trimmed all the same. It
// may not have committed yet that files were deleted: xfs does so up to 30 s later.
const patience = 3

// worth reports whether a filesystem has left so much space unused that trimming is worth it.
func (t trim) worth(unused int64) bool { return unused-t.kept >= worthTrimming }

// after is what to remember of a filesystem that was trimmed, and has so much space unused.
func (t trim) after(unused int64) trim {
	if t.worth(unused) && t.tries+1 < patience {
		return trim{kept: t.kept, tries: t.tries + 1}
	}
	return trim{kept: unused}
}

// Trim returns the space of deleted files: from the filesystems of mounted volumes to the
// pool, and from the pool to the layers below it. Thick volumes keep theirs. It looks at
// each mounted volume, which takes some 50 µs, and trims those where it is worth it. It must
// not be called twice at the same time.
//
// The filesystems of volumes are not mounted with the option discard. Then each deleted file
// would leave holes of its own, and the sync after it would wait for them: see docs/figures.md.
func (m *Manager) Trim(ctx context.Context) error {
	table, err := place.ReadTable()
	if err != nil {
		return err
	}
	ids, err := m.images.IDs()
	if err != nil {
		return err
	}
	before := m.trims.volumes
	m.trims.volumes = map[string]trim{} // forgets the volumes that are gone
	for index, places := range table.ByLoop {
		if err := m.trimDevice(ctx, index, places, ids, before); err != nil {
			return err
		}
	}
	if err := m.trimPool(); err != nil {
		m.warnUntrimmed("pool", "The pool cannot be trimmed; space of volumes that were deleted is not returned to the filesystem below", err)
	}
	return nil
}

// warnUntrimmed logs that something could not be trimmed. Trim tries again and again.
func (m *Manager) warnUntrimmed(what, message string, err error) {
	if show, left := m.trims.failed.Failed(what, "trim"); show {
		logs.Warn(message, "err", err, "what", what, "notLogged", left)
	}
}

// trimDevice trims the volume that is mounted from a loop device, if there is one. It returns an
// error only if ctx has ended.
func (m *Manager) trimDevice(ctx context.Context, index int, places []string, ids map[image.FileID]string, before map[string]trim) error {
	img, err := m.volumeOn(index, ids)
	if err != nil || img == nil {
		return context.Cause(ctx) // somebody else's device, or a volume that other calls complain of
	}
	defer img.Close()
	if img.Mode() != image.ModeFilesystem || !img.Record.Provisioning.NeedsFreeSpace() {
		return nil
	}
	for _, at := range places {
		if rel, below := m.root.Below(at); below {
			is, err := m.trimMounted(ctx, img, rel, before[img.ID()])
			m.trims.volumes[img.ID()] = is
			if err != nil && ctx.Err() == nil {
				m.warnUntrimmed("volume "+img.ID(), "A volume cannot be trimmed; space of files that were deleted in it is not returned", err)
			}
			break
		}
	}
	return context.Cause(ctx)
}

// volumeOn opens the volume that is behind a loop device, or returns nil.
func (m *Manager) volumeOn(index int, ids map[image.FileID]string) (*image.Image, error) {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	info, err := dev.Info()
	id := ids[image.FileID{Device: info.Device, Inode: info.Inode}]
	if err != nil || id == "" {
		return nil, err
	}
	img, err := m.images.Open(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if ours, err := img.Owns(dev); err != nil || !ours {
		return nil, errors.Join(err, img.Close())
	}
	return img, nil
}

// trimMounted trims the filesystem that is mounted at a path, if that is worth it, and returns
// what to remember of it.
func (m *Manager) trimMounted(ctx context.Context, img *image.Image, rel string, was trim) (trim, error) {
	unused, length, err := m.unusedAt(img, rel)
	if err != nil || !was.worth(unused) {
		return was, untrimmable(err)
	}
	for part := (fsctl.Range{Length: trimPart}); part.Start < length; part.Start += part.Length {
		if ctx.Err() != nil {
			return was, context.Cause(ctx)
		}
		if err := m.trimPart(img, rel, part); err != nil {
			return was, untrimmable(err)
		}
	}
	left, _, err := m.unusedAt(img, rel)
	if err != nil {
		return was, untrimmable(err)
	}
	klog.V(2).InfoS("Trimmed a volume", "volume", img.ID(), "returned", size.Format(max(0, unused-left)))
	return was.after(left), nil
}

// trimPart trims a part of a volume's filesystem, while no other operation works on the volume.
func (m *Manager) trimPart(img *image.Image, rel string, part fsctl.Range) error {
	unlock, err := m.locks.volume(img.ID())
	if err != nil {
		return err
	}
	defer unlock()
	// Something else may cover it by now.
	if _, err := m.root.Identify(img, rel); err != nil {
		return err
	}
	dir, err := m.openMounted(rel)
	if err != nil {
		return err
	}
	defer dir.Close()
	return fsctl.Trim(dir, part, leastTrim)
}

// openMounted opens the root of a mounted filesystem for reading.
func (m *Manager) openMounted(rel string) (*os.File, error) {
	at, err := m.root.OpenMounted(rel)
	if err != nil {
		return nil, err
	}
	defer at.Close()
	return mount.Open(at)
}

// unusedAt is the space that an image takes and that its filesystem does not use, and the size
// of the filesystem, in bytes.
func (m *Manager) unusedAt(img *image.Image, rel string) (unused, length int64, err error) {
	dir, err := m.openMounted(rel)
	if err != nil {
		return 0, 0, err
	}
	defer dir.Close()
	st, err := fsctl.StatusOf(dir)
	if err != nil {
		return 0, 0, err
	}
	allocated, err := img.Allocated()
	return allocated - st.Used, st.Total, err
}

// untrimmable drops the errors of a volume that is not to be trimmed now: another operation works
// on it, it was unmounted, something else covers it, its mount or device takes no discards, or
// its filesystem has shut down.
func untrimmable(err error) error {
	for _, e := range []error{
		errdefs.ErrBusy, errdefs.ErrState, os.ErrNotExist, place.ErrForeign, errors.ErrUnsupported, syscall.EROFS, syscall.EIO,
	} {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

// trimPool trims the pool, if there is a layer below it and it is worth it.
func (m *Manager) trimPool() error {
	unused, err := m.pool.Unused()
	if err != nil || !m.trims.pool.worth(unused) {
		return err
	}
	if err := m.pool.Trim(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	left, err := m.pool.Unused()
	m.trims.pool = m.trims.pool.after(left)
	return err
}
