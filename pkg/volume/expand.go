// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"path/filepath"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Size is a range of sizes, in bytes.
type Size struct {
	Required int64 // at least; 0 is whatever there is
	Limit    int64 // at most; 0 is no limit
}

// Expand makes a persistent volume at least as large as is required, durably, and
// tells its size and mode then. It never makes one smaller.
//
// The image grows, and what is promised. A device that is attached, and the
// filesystem on it, follow in [Manager.ExpandOnNode], or when the volume is staged
// the next time.
//
// Errors are ErrInvalid for a use that the volume does not have, ErrNotFound,
// [diskfs.ErrOutOfRange], [pool.ErrFull], [ErrUnderWay] while the volume is being
// copied or grown, or the kernel's.
func (m *Manager) Expand(id string, want Size, use *Use) (int64, Mode, error) {
	img, err := m.openExpandable(id, use)
	if err != nil {
		return 0, "", err
	}
	defer img.Close()
	err = m.expand(img, want)
	return img.Spec.Size, img.Mode, err
}

// openExpandable opens a volume that is said to be used so; nil is nothing said.
func (m *Manager) openExpandable(id string, use *Use) (*image, error) {
	img, err := m.openClaim(id)
	if err != nil || use == nil {
		return img, err
	}
	if err := img.Supports(*use); err != nil {
		img.Close()
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return img, nil
}

func (m *Manager) expand(img *image, want Size) error {
	spec := img.Spec
	spec.Size = max(spec.Size, diskfs.RoundUp(want.Required))
	if want.Limit > 0 && img.Spec.Size > want.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: volume %s has %d bytes, and volumes do not shrink; copy what it holds into a smaller one",
			diskfs.ErrOutOfRange, want.Limit, img.ID, img.Spec.Size)
	}
	if want.Limit > 0 && spec.Size > want.Limit {
		return fmt.Errorf("%w: capacity_range.limit_bytes %d: volume %s would have %d bytes, as sizes are whole MiB; raise the limit",
			diskfs.ErrOutOfRange, want.Limit, img.ID, spec.Size)
	}
	if spec.Size == img.Spec.Size {
		return nil
	}
	if err := spec.Validate(); err != nil {
		return fmt.Errorf("capacity_range: %w", err)
	}
	release, err := m.admit(claimDemand("", spec.Size-img.Spec.Size, img.Thick))
	if err != nil {
		return err
	}
	defer release()
	unlock, err := m.exclusive(m.ctx, img, settleTime)
	if err != nil {
		return err
	}
	defer unlock()
	// The image first: a record must not promise what is not there.
	if err := img.resize(spec.Size); err != nil {
		return pool.Full(err)
	}
	grown := img.Record
	grown.Version, grown.Spec = recordVersion, spec
	if err := pool.SetRecord(img.File, pool.VolumeAttr, grown); err != nil {
		return err
	}
	if err := tmpfile.Sync(img.File); err != nil {
		return pool.Full(err)
	}
	img.Record = grown
	return nil
}

// ExpandOnNode makes a persistent volume that is in use at a path as large as is
// required: its image if need be, its device, its filesystem. It returns the
// volume's size.
//
// Errors are those of [Manager.Expand]; ErrNotFound also if the volume is not at
// that path, ErrState where the filesystem cannot grow while it is mounted: it
// does so when it is staged the next time.
func (m *Manager) ExpandOnNode(id, path string, want Size, use *Use) (int64, error) {
	img, err := m.openExpandable(id, use)
	if err != nil {
		return 0, err
	}
	defer img.Close()
	rel, err := m.shownAt(img, path)
	if err != nil {
		return 0, err
	}
	if err := m.expand(img, want); err != nil {
		return 0, err
	}
	if img.Mode == ModeDiskImage {
		return img.Spec.Size, nil
	}
	if err := img.updateDevices(); err != nil {
		return 0, err
	}
	if img.Mode == ModeBlock {
		return img.Spec.Size, nil
	}
	return img.Spec.Size, m.growInUse(img, rel)
}

// updateDevices tells all loop devices of an image its size.
func (img *image) updateDevices() error {
	loops, err := loopdev.Find(img.File)
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
		ours, err := dev.Backs(img.File)
		if err == nil && ours {
			err = dev.UpdateSize()
		}
		if err := errors.Join(err, dev.Close()); err != nil {
			return err
		}
	}
	return nil
}

// shownAt returns the path, below the kubelet's directory, where a volume is
// staged or published, and is ErrNotFound if it is not there.
func (m *Manager) shownAt(img *image, path string) (string, error) {
	rel, err := m.relative(path)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	at, err := m.look(rel, img.Mode)
	if img.Mode == ModeBlock && errors.Is(err, ErrInvalid) {
		// The staging path of a block volume is a directory with nothing in it, and
		// kubelet may name it.
		return rel, m.stagedDevice(img, rel)
	}
	if err != nil && !errors.Is(err, ErrInvalid) {
		return "", err
	}
	if err != nil {
		return "", fmt.Errorf("%w: volume %s is not at %q: %w", ErrNotFound, img.ID, filepath.Join(m.rootPath, rel), err)
	}
	if !at.mounted {
		return "", fmt.Errorf("%w: volume %s is not at %q", ErrNotFound, img.ID, filepath.Join(m.rootPath, rel))
	}
	if _, err := m.shown(img, rel); errors.Is(err, errForeign) {
		return "", fmt.Errorf("%w: %w", ErrNotFound, err)
	} else if err != nil {
		return "", err
	}
	return rel, nil
}

// stagedDevice is ErrNotFound unless the path is a directory, as a staging path
// is, and the volume attached.
func (m *Manager) stagedDevice(img *image, rel string) error {
	path := filepath.Join(m.rootPath, rel)
	dir, err := mount.OpenTarget(m.root, rel, syscall.O_DIRECTORY)
	if isPathError(err) {
		return fmt.Errorf("%w: volume %s is not at %q: %w", ErrNotFound, img.ID, path, err)
	}
	if err != nil {
		return err
	}
	dir.Close()
	loops, err := loopdev.Find(img.File)
	if err == nil && len(loops) == 0 {
		err = fmt.Errorf("%w: volume %s is not at %q", ErrNotFound, img.ID, path)
	}
	return err
}
