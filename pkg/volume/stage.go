// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/device"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/place"
)

// A claim on its node:
//
//	mode        staged                          published
//	filesystem  mounted at the staging path     a bind mount of that
//	block       attached, and stays so          a bind mount of the device node
//	diskImage   (nothing to do)                 its image bound into a tmpfs
//
// Each call reads this from the loop devices and the mount table, and so finds out where an
// earlier call stopped.

// Use is how a claim is to be used: a volume capability.
type Use struct {
	Block      bool
	Filesystem string // "" means any
	image.Access
	// SingleTarget allows one target path at a time.
	SingleTarget bool
}

// Supports returns [errdefs.ErrState] if a claim cannot be used as u says.
func Supports(have image.Record, u Use) error { return supports(have, u, errdefs.ErrState) }

// supports is [Supports] with another kind of error.
func supports(have image.Record, u Use, kind error) error {
	if u.Block != (have.Mode == image.ModeBlock) {
		asked := "Filesystem"
		if u.Block {
			asked = "Block"
		}
		return fmt.Errorf("%w: volumeMode %s: volume %s was made as %s; use the volumeMode that its claim had", kind, asked, have.ID, have.Mode)
	}
	if !u.mayMount(have) {
		return fmt.Errorf("%w: fsType %q: volume %s has %s; ask for that, or for none", kind, u.Filesystem, have.ID, have.Spec.Filesystem)
	}
	return nil
}

// mayMount reports whether the filesystem that a use names goes with a claim. The content of a disk image is not mounted
// here, so its fsType does not matter. A PersistentVolume has the fsType of its class, and the default where that names
// none. What the volume has may be another one by the parameter format, or by the source of a copy.
func (u Use) mayMount(have image.Record) bool {
	decidedElsewhere := u.Filesystem == "" || u.Filesystem == diskfs.Default || have.Source != image.Source{}
	return have.Mode != image.ModeFilesystem || decidedElsewhere || u.Filesystem == have.Spec.Filesystem
}

// StageRequest asks for a claim to be made ready on this node.
type StageRequest struct {
	ID      string
	Staging string // absolute path of a directory below the kubelet's
	Use
}

// Stage attaches a claim and mounts its filesystem at the staging path, or finds that done.
// It grows a filesystem that is smaller than its volume. One that gave up after an error is
// mounted anew, unless a pod still has it: then the error is [errdefs.ErrState].
//
// Errors are [errdefs.ErrInvalid], [errdefs.ErrNotFound], [errdefs.ErrExists] for another
// mount at the path, [errdefs.ErrState], [errdefs.ErrBusy], [pool.ErrFull], or the
// kernel's.
func (m *Manager) Stage(ctx context.Context, r StageRequest) error {
	unlock, err := m.locks.volume(r.ID)
	if err != nil {
		return err
	}
	defer unlock()
	img, err := m.openUsable(r.ID, r.Use)
	if err != nil {
		return err
	}
	defer img.Close()
	return m.stage(ctx, img, r.Staging, r.Access)
}

// openUsable opens a claim. It returns [errdefs.ErrState] if the image is too short, or if
// the claim cannot be used as u says, here or anywhere.
func (m *Manager) openUsable(id string, u Use) (*image.Image, error) {
	img, err := m.images.OpenClaim(id)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(Supports(img.Record, u), img.CheckLength(), checkContext(u.Access)); err != nil {
		img.Close()
		return nil, err
	}
	return img, nil
}

func (m *Manager) stage(ctx context.Context, img *image.Image, staging string, access image.Access) error {
	rel, err := m.stagingRel(staging)
	if err != nil {
		return err
	}
	at, err := m.root.Inspect(rel, image.ModeFilesystem)
	if err == nil && !at.Exists {
		err = fmt.Errorf("%w: the directory does not exist", errdefs.ErrInvalid)
	}
	if err != nil {
		return fmt.Errorf("staging_target_path %q: %w", staging, err)
	}
	switch {
	case img.Mode() == image.ModeDiskImage:
		return nil
	case img.Mode() == image.ModeBlock:
		if err := img.MarkStaged(staging); err != nil {
			return err
		}
		dev, err := m.devices.Block(img, access.ReadOnly)
		if err != nil {
			return err
		}
		return dev.Close()
	case !at.Mounted:
		return m.stageFilesystem(ctx, img, rel, access)
	}
	there, err := m.mountedAt(img, rel)
	if err == nil && there.Access != access {
		err = fmt.Errorf("%w: volume %s has the mount options %s, and %s are asked for; delete its pods first: it is staged at %q", errdefs.ErrExists, img.ID(), there.Access, access, staging)
	}
	if err != nil {
		return err
	}
	return m.reviveStaged(ctx, img, rel, there, access)
}

// stagingRel is the part of a staging path below the kubelet's directory.
func (m *Manager) stagingRel(staging string) (string, error) {
	rel, err := m.root.Rel(staging)
	if err != nil {
		return "", fmt.Errorf("staging_target_path: %w", err)
	}
	return rel, nil
}

// stageFilesystem mounts a volume where nothing is mounted.
func (m *Manager) stageFilesystem(ctx context.Context, img *image.Image, rel string, access image.Access) error {
	m.images.Refill(img)
	target, err := m.root.OpenDir(rel)
	if err != nil {
		return err
	}
	defer target.Close()
	grown, err := img.Grown()
	if err != nil {
		return err
	}
	if !grown && fsctl.MayGrow(img.Record.Spec.Filesystem) != nil {
		larger, err := m.growth.unmounted(ctx, img)
		if err != nil {
			return err
		}
		defer larger.Close()
		img, grown = larger, true
	}
	if img.Record.CommitTo != "" {
		if err := img.UnmarkWritten(); err != nil {
			return err
		}
	}
	// A filesystem cannot grow through a read-only mount.
	writable := access
	writable.ReadOnly = false
	mnt, err := m.detached(img, writable)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if !grown {
		if err := growMounted(img, mnt.File()); err != nil {
			return err
		}
	}
	if access.ReadOnly {
		if err := mnt.SetAttr(access.Attr()); err != nil {
			return err
		}
	}
	return m.attach(img, mnt, target, rel)
}

// Unstage unmounts a claim from its staging path and detaches it. A claim that is not staged
// is fine. One that is still published returns [errdefs.ErrState], and so does another mount
// at the path, and a disk.img that somebody has mounted or open anywhere.
func (m *Manager) Unstage(id, staging string) error {
	if err := image.CheckID(id); err != nil {
		return err
	}
	rel, err := m.stagingRel(staging)
	if err != nil {
		return err
	}
	unlock, err := m.locks.volume(id)
	if err != nil {
		return err
	}
	defer unlock()
	img, err := m.images.OpenClaim(id)
	if errors.Is(err, errdefs.ErrNotFound) {
		return m.unstageLost(id, rel)
	}
	if err != nil {
		return err
	}
	defer img.Close()
	loops, err := loopdev.Known(img.File)
	if err != nil {
		return err
	}
	if err := m.root.CheckOnlyAt(img, loops, "to unstage it, unpublish it first", rel); err != nil {
		return err
	}
	if img.Mode() == image.ModeDiskImage {
		if err := m.root.CheckDiskUnused(img); err != nil {
			return err
		}
	}
	if img.Mode() != image.ModeBlock {
		return m.unstageFilesystem(img, rel)
	}
	if err := device.Detach(img, loops); err != nil {
		return err
	}
	return img.UnmarkStaged()
}

// unstageFilesystem unmounts a claim. One that is to be committed once it is deleted is written out before, so that
// it is known then whether its image has everything.
func (m *Manager) unstageFilesystem(img *image.Image, rel string) error {
	if img.Record.CommitTo == "" {
		was, err := m.root.Clear(img, rel)
		if err == nil {
			device.LetGo(img, was.Device)
		}
		return err
	}
	was, err := m.root.Take(img, rel)
	if err != nil {
		return err
	}
	if err := writeOut(img, was.Root); err != nil {
		logs.Warn("Not everything could be written to the image of a claim, so it cannot be committed", "err", err, "volume", img.ID())
	}
	if was.Root != nil {
		was.Root.Close()
	}
	device.LetGo(img, was.Device)
	return nil
}

// unstageLost unmounts and detaches what is left of a volume without an image.
func (m *Manager) unstageLost(id, rel string) error {
	lost, err := m.root.Lost(m.images, id, rel)
	if err != nil {
		return err
	}
	if _, err := m.root.Clear(lost, rel); err != nil {
		return err
	}
	loops, err := loopdev.Attached()
	if err != nil {
		return err
	}
	return device.Detach(lost, loops)
}

// mountedAt identifies a volume's mount at a target. A mount of something else returns
// [errdefs.ErrExists].
func (m *Manager) mountedAt(img *image.Image, rel string) (place.Mount, error) {
	there, err := m.root.Identify(img, rel)
	if errors.Is(err, place.ErrForeign) {
		err = fmt.Errorf("%w: %w", errdefs.ErrExists, err)
	}
	return there, err
}
