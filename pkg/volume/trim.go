// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
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
)

// trims remembers, by name, what was trimmed.
type trims map[string]trim

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
// The filesystems of volumes are not mounted with the option discard. Deleting many files,
// and the sync after it, would take up to a second longer; FITRIM returns the same space in
// some milliseconds, while nobody waits: see docs/figures.md.
func (m *Manager) Trim(ctx context.Context) error {
	table, err := place.ReadTable()
	if err != nil {
		return err
	}
	now := trims{} // forgets the volumes that are gone
	for index, places := range table.ByLoop {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := m.trimDevice(index, places, now); err != nil {
			klog.ErrorS(err, "A volume cannot be trimmed; space of files that were deleted in it is not returned", "loopDevice", index)
		}
	}
	if err := m.trimPool(now); err != nil {
		klog.ErrorS(err, "The pool cannot be trimmed; space of volumes that were deleted is not returned to the filesystem below")
	}
	m.trims = now
	return nil
}

// trimDevice trims the volume that is mounted from a loop device, if there is one.
func (m *Manager) trimDevice(index int, places []string, now trims) error {
	img, err := m.volumeOn(index)
	if err != nil || img == nil {
		return err
	}
	defer img.Close()
	if img.Mode() != image.ModeFilesystem || !img.Record.Provisioning.NeedsFreeSpace() {
		return nil
	}
	unlock, err := m.locks.volume(img.ID())
	if errors.Is(err, errdefs.ErrBusy) { // the next Trim looks again
		now[img.ID()] = m.trims[img.ID()]
		return nil
	}
	if err != nil {
		return err
	}
	defer unlock()
	for _, at := range places {
		if rel, below := m.root.Below(at); below {
			return m.trimMounted(img, rel, now)
		}
	}
	return nil
}

// volumeOn opens the volume that is behind a loop device, or returns nil.
func (m *Manager) volumeOn(index int) (*image.Image, error) {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) || errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	info, err := dev.Info()
	if err != nil || image.CheckID(info.Name) != nil {
		return nil, err
	}
	img, err := m.images.Open(info.Name) // a guess, which the inode then proves
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

// trimMounted trims the filesystem that is mounted at a path.
func (m *Manager) trimMounted(img *image.Image, rel string, now trims) error {
	at, err := m.root.OpenMounted(rel)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, errdefs.ErrState) { // unmounted meanwhile
		return nil
	}
	if err != nil {
		return gone(err)
	}
	defer at.Close()
	dir, err := mount.Open(at)
	if err != nil {
		return gone(err)
	}
	defer dir.Close()
	unused, err := unusedOf(img, dir)
	if err != nil {
		return err
	}
	now[img.ID()] = m.trims[img.ID()]
	if !m.trims[img.ID()].worth(unused) {
		return nil
	}
	// Something else may cover it. This look takes longer with each mount of the node.
	if _, err := m.root.Identify(img, rel); errors.Is(err, place.ErrForeign) || errors.Is(err, errdefs.ErrState) {
		return nil
	} else if err != nil {
		return err
	}
	err = fsctl.Trim(dir, leastTrim)
	if err = gone(err); err != nil && !errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("volume %s: %w", img.ID(), err)
	}
	left, err := unusedOf(img, dir)
	if err != nil {
		return err
	}
	now[img.ID()] = m.trims[img.ID()].after(left)
	klog.V(2).InfoS("Trimmed a volume", "volume", img.ID(), "returned", size.Format(max(0, unused-left)))
	return nil
}

// gone drops the error of a filesystem that has shut down: nobody can use its space anyway.
func gone(err error) error {
	if errors.Is(err, syscall.EIO) {
		return nil
	}
	return err
}

// unusedOf is the space that an image takes and that its filesystem does not use, in bytes.
func unusedOf(img *image.Image, root *os.File) (int64, error) {
	st, err := fsctl.StatusOf(root)
	if err != nil {
		return 0, err
	}
	allocated, err := img.Allocated()
	return allocated - st.Used, err
}

// trimPool trims the pool, if there is a layer below it.
func (m *Manager) trimPool(now trims) error {
	const name = "the pool" // no volume's id has spaces
	unused, err := unusedBelow(m.pool)
	if err != nil {
		return err
	}
	now[name] = m.trims[name]
	if !m.trims[name].worth(unused) {
		return nil
	}
	if err := m.pool.Trim(); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	left, err := unusedBelow(m.pool)
	now[name] = m.trims[name].after(left)
	return err
}

// unusedBelow is the space that the pool takes of the layer below and does not use, in bytes.
func unusedBelow(p *pool.Pool) (int64, error) {
	layers, err := p.Layers()
	if err != nil || len(layers) == 1 {
		return 0, err
	}
	return layers[1].Allocated - layers[0].Used, nil
}
