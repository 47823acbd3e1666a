// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// A persistent volume on its node:
//
//	mode        staged                          published
//	filesystem  mounted at the staging path     a bind mount of that
//	block       attached, and stays so          a bind mount of the device node
//	diskImage   (nothing to do)                 its image bound into a tmpfs
//
// All of it is read from the loop devices and the mount table, so that every call
// finds out where an earlier one stopped.

// Use is how a persistent volume is to be used: a volume capability.
type Use struct {
	Block      bool
	Filesystem string // "" is any
	Access
	// SingleTarget allows one target path at a time.
	SingleTarget bool
}

// Supports is ErrState where a volume cannot be used so.
func (have Record) Supports(u Use) error {
	if u.Block != (have.Mode == ModeBlock) {
		asked := "mount"
		if u.Block {
			asked = "block"
		}
		return fmt.Errorf("%w: volume_capability.access_type %s: volume %s was made as %s; use the volumeMode that its claim had", ErrState, asked, have.ID, have.Mode)
	}
	// What is in a disk image is not mounted here, whatever fsType it got.
	if have.Mode == ModeFilesystem && u.Filesystem != "" && u.Filesystem != have.Spec.Filesystem {
		return fmt.Errorf("%w: volume_capability.mount.fs_type %q: volume %s has %s", ErrState, u.Filesystem, have.ID, have.Spec.Filesystem)
	}
	return nil
}

// StageRequest asks for a persistent volume to be made ready on this node.
type StageRequest struct {
	ID      string
	Staging string // absolute path of a directory below the kubelet's
	Use
}

// Stage attaches a persistent volume, and mounts its filesystem at the staging
// path, or finds that done. A filesystem that is smaller than its volume grows.
//
// Errors are ErrInvalid, ErrNotFound, ErrExists for another mount at the path,
// ErrState, [pool.ErrFull], or the kernel's.
func (m *Manager) Stage(ctx context.Context, r StageRequest) error {
	img, err := m.openUsable(r.ID, r.Use)
	if err != nil {
		return err
	}
	defer img.Close()
	return m.stage(ctx, img, r.Staging, r.Access)
}

// openUsable opens a persistent volume that is whole and can be used so.
func (m *Manager) openUsable(id string, u Use) (*image, error) {
	img, err := m.openClaim(id)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(img.Supports(u), img.whole()); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

// whole holds an image against its record. A pod may make its disk.img as small as
// it likes, as by copying another image over it.
func (img *image) whole() error {
	return whole(img.File, img.Mode, img.Spec.Size, "volume "+img.ID, "restore it from a snapshot, or delete it")
}

// whole holds a snapshot against its record, likewise.
func (s *snapshot) whole() error {
	return whole(s.File, s.Mode, s.Spec.Size, "snapshot "+s.ID, "delete it")
}

func whole(f *os.File, mode Mode, size int64, what, remedy string) error {
	fi, err := f.Stat()
	if err != nil || mode == ModeDiskImage {
		return err
	}
	if fi.Size() < size {
		return fmt.Errorf("%w: %s: its image has %d bytes, it should have %d: the rest is lost; %s", ErrState, what, fi.Size(), size, remedy)
	}
	return nil
}

func (m *Manager) stage(ctx context.Context, img *image, staging string, access Access) error {
	rel, err := m.relative(staging)
	if err != nil {
		return fmt.Errorf("staging_target_path: %w", err)
	}
	at, err := m.look(rel, ModeFilesystem)
	if err == nil && !at.exists {
		err = fmt.Errorf("%w: it must be a directory", ErrInvalid)
	}
	if err != nil {
		return fmt.Errorf("staging_target_path %q: %w", staging, err)
	}
	switch {
	case img.Mode == ModeDiskImage:
		return nil
	case img.Mode == ModeBlock:
		// For the sweep: a device that stays says nothing of who wants it.
		if err := pool.SetRecord(img.File, pool.StagedAttr, staging); err != nil {
			return err
		}
		dev, err := m.device(img, access.ReadOnly)
		if err != nil {
			return err
		}
		return dev.Close()
	case !at.mounted:
		return m.stageFilesystem(ctx, img, rel, access)
	}
	there, err := m.alreadyShown(img, rel)
	if err == nil && there.access != access {
		err = fmt.Errorf("%w: volume %s is staged at %q as %s, asked for %s; unstage it first", ErrExists, img.ID, staging, there.access, access)
	}
	return err
}

// stageFilesystem mounts a volume where nothing is mounted.
func (m *Manager) stageFilesystem(ctx context.Context, img *image, rel string, access Access) error {
	m.refill(img)
	target, err := mount.OpenTarget(m.root, rel, syscall.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer target.Close()
	short, err := img.short()
	if err != nil {
		return err
	}
	if short && fsctl.MayGrow(img.Spec.Filesystem) != nil {
		grown, err := m.growUnmounted(ctx, img)
		if err != nil {
			return err
		}
		defer grown.Close()
		img, short = grown, false
	}
	// Nothing grows through a mount that is read-only.
	writable := access
	writable.ReadOnly = false
	mnt, err := m.mountImage(img, writable)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if short {
		if err := growMounted(img, mnt.File()); err != nil {
			return err
		}
	}
	if access.ReadOnly {
		if err := mnt.SetAttr(access.attr()); err != nil {
			return err
		}
	}
	return mnt.Attach(target)
}

// device returns the loop device of a block volume, attaching it if need be. It
// stays attached: a bind mount of its node is no user that would keep it.
//
// A reader beside a writer has a device of its own. What it reads through its page
// cache is what was there at the first reading.
func (m *Manager) device(img *image, readOnly bool) (*loopdev.Device, error) {
	loops, err := loopdev.Find(img.File)
	if err != nil {
		return nil, err
	}
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
			// One that an unstage could not detach yet, as somebody has it open, would
			// vanish under its pod with that one; and it may have grown since.
			if err = errors.Join(dev.Keep(), dev.UpdateSize()); err == nil {
				return dev, nil
			}
		}
		dev.Close()
		if err != nil {
			return nil, err
		}
	}
	m.refill(img)
	return m.attachNew(img, loopdev.Options{ReadOnly: readOnly})
}

// Unstage takes a persistent volume away from this node. What is not there is
// fine. A volume that is still published somewhere is ErrState, and so is another
// mount at the path.
func (m *Manager) Unstage(id, staging string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	rel, err := m.relative(staging)
	if err != nil {
		return fmt.Errorf("staging_target_path: %w", err)
	}
	img, err := m.openClaim(id)
	if errors.Is(err, ErrNotFound) {
		return m.unstageLost(id, rel)
	}
	if err != nil {
		return err
	}
	defer img.Close()
	loops, err := loopdev.Find(img.File)
	if err != nil {
		return err
	}
	places, err := m.placesOf(img, loops)
	if err != nil {
		return err
	}
	for _, at := range places {
		if at != filepath.Join(m.mountPath, rel) {
			return fmt.Errorf("%w: volume %s is still published at %s; unpublish it first", ErrState, id, at)
		}
	}
	if img.Mode != ModeBlock {
		device, err := m.clear(img, rel)
		if err == nil {
			m.letGo(img, device)
		}
		return err
	}
	for _, index := range loops {
		if err := m.detach(img, index); err != nil {
			return err
		}
	}
	return pool.RemoveRecord(img.File, pool.StagedAttr)
}

// unstageLost takes away what is left of a volume that has no image any more.
func (m *Manager) unstageLost(id, rel string) error {
	img, err := m.lost(id, rel)
	if err != nil {
		return err
	}
	if _, err := m.clear(img, rel); err != nil {
		return err
	}
	loops, err := loopdev.Attached()
	if err != nil {
		return err
	}
	for _, index := range loops {
		if err := m.detach(img, index); err != nil {
			return err
		}
	}
	return nil
}

// detach detaches a loop device, if it still is the image's.
func (m *Manager) detach(img *image, index int) error {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return nil
	}
	if err != nil {
		return err
	}
	if ours, err := m.deviceOf(dev, img); err != nil || !ours {
		return errors.Join(err, dev.Close())
	}
	if err := dev.Sync(); err != nil {
		dev.Close()
		return fmt.Errorf("volume %s: %w", img.ID, err)
	}
	if err := dev.Detach(); err != nil && !errors.Is(err, loopdev.ErrNotAttached) {
		return err
	}
	m.letGo(img, index)
	return nil
}
