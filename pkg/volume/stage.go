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
	"time"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/reflink"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
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
	fi, err := img.Stat()
	if err != nil || img.Mode == ModeDiskImage {
		return err
	}
	if fi.Size() < img.Spec.Size {
		return fmt.Errorf("%w: volume %s: its image has %d bytes, it should have %d: the rest is lost; restore it from a snapshot, or delete it",
			ErrState, img.ID, fi.Size(), img.Spec.Size)
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

// short reports whether the filesystem in an image could grow.
func (img *image) short() (bool, error) {
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return false, err
	}
	sb, err := fs.Identify(img.File)
	if errors.Is(err, diskfs.ErrCorrupt) {
		return false, fmt.Errorf("%w: volume %s: %w; check %s with %s, or restore it from a snapshot", ErrState, img.ID, err, img.Name(), fs.Checker)
	}
	return err == nil && sb.Short(img.Spec.Size), err
}

// growMounted grows a filesystem through the root of a writable mount of it, open
// with O_PATH.
func growMounted(img *image, root *os.File) error {
	f, err := mount.Open(root)
	if err != nil {
		return err
	}
	defer f.Close()
	return pool.Full(fsctl.Grow(f, img.Spec.Size))
}

// growUnmounted grows the filesystem of a volume that nobody has mounted, and
// returns the image that has it then. What somebody still has, as in another mount
// namespace, stays as it is, and so does what a full pool has no room to grow.
//
// It may take longer than the caller has time: [ErrUnderWay].
func (m *Manager) growUnmounted(ctx context.Context, img *image) (*image, error) {
	err := m.unused(img)
	if err != nil && !errors.Is(err, ErrState) {
		return nil, err
	}
	if err != nil || m.grow == nil {
		klog.InfoS("A filesystem that cannot grow here while it is mounted stays smaller than its volume", "volume", img.ID, "reason", err)
		return m.open(img.ID)
	}
	_, err = outlive(ctx, m, "growth of "+volumeKey(img.ID), func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.growCopy(ctx, img.ID)
	})
	if errors.Is(err, pool.ErrFull) {
		klog.ErrorS(err, "A filesystem stays smaller than its volume", "volume", img.ID)
		err = nil
	}
	if err != nil {
		return nil, err
	}
	return m.open(img.ID)
}

// growCopy puts a copy of an image with a larger filesystem in the image's place:
// a tool that is killed half-way leaves what nobody could mount.
func (m *Manager) growCopy(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, growLimit)
	defer cancel()
	img, err := m.openClaim(id)
	if err != nil {
		return err
	}
	defer img.Close()
	unlock, err := m.exclusive(ctx, img, settleTime)
	if err != nil {
		return err
	}
	defer unlock()
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return err
	}
	f, err := m.pool.NewVolume()
	if err != nil {
		return err
	}
	defer f.Close()
	larger := &image{File: f, Record: img.Record, fresh: true}
	if err := reflink.Clone(f, img.File); err != nil {
		return pool.Full(err)
	}
	if err := larger.resize(img.Spec.Size); err != nil {
		return pool.Full(err)
	}
	if err := m.growDevice(ctx, larger, fs); err != nil {
		// The tools say of a full pool what they say of a broken disk.
		if s, e := m.pool.Space(); e == nil && s.Available < growRoom {
			return fmt.Errorf("%w: growing the filesystem of volume %s: %w", pool.ErrFull, id, err)
		}
		return fmt.Errorf("%w: volume %s: %w; check %s with %s", ErrState, id, err, img.Name(), fs.Checker)
	}
	if err := pool.SetRecord(f, pool.VolumeAttr, larger.Record); err != nil {
		return err
	}
	return pool.Full(tmpfile.Replace(f, m.pool.Volume(id)))
}

const (
	// growLimit is for tools that hang: on an empty 8 TiB they take half a minute.
	growLimit = 30 * time.Minute

	// growRoom is less than what e2fsck and resize2fs write.
	growRoom = 4 * diskfs.MiB
)

// growDevice runs the filesystem's own tools on an image.
func (m *Manager) growDevice(ctx context.Context, img *image, fs *diskfs.Filesystem) error {
	dev, err := m.attachNew(img, loopdev.Options{AutoClear: true})
	if err != nil {
		return err
	}
	defer m.letGo(img, dev.Index())
	defer dev.Close()
	if err := m.grow(ctx, fs, dev.Path()); err != nil {
		return err
	}
	return dev.Sync()
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
	return nil
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

// PublishRequest asks for a persistent volume at a target.
type PublishRequest struct {
	ID      string
	Staging string // where it is staged, or will be
	Target  string // absolute path below the kubelet's directory; its parent exists
	Use            // as it is staged
	// TargetReadOnly forbids writing at this target, whatever others may.
	TargetReadOnly bool
}

// access is what the target allows.
func (r PublishRequest) access() Access {
	a := r.Access
	a.ReadOnly = a.ReadOnly || r.TargetReadOnly
	return a
}

// PublishClaim shows a persistent volume at a target, or finds it there. It stages
// the volume first if it is not, as after a reboot that the container orchestrator
// has not noticed.
//
// Errors are those of [Manager.Stage]; ErrExists also means that the volume is
// there with another access, ErrState that it is at another target and may have
// one only.
func (m *Manager) PublishClaim(ctx context.Context, r PublishRequest) (err error) {
	rel, err := m.relative(r.Target)
	if err != nil {
		return err
	}
	img, err := m.openUsable(r.ID, r.Use)
	if err != nil {
		return err
	}
	defer img.Close()
	at, err := m.look(rel, img.Mode)
	if err != nil {
		return err
	}
	if at.mounted {
		there, err := m.alreadyShown(img, rel)
		if err != nil {
			return err
		}
		if there.whole {
			return img.sameAccess(there.access, r.access(), r.Target)
		}
		if err := m.unmount(img, r.Target); err != nil {
			return err
		}
	}
	// After what is there was found to be right: kubelet binds it elsewhere as well,
	// for subPath and for block devices.
	if r.SingleTarget {
		if err := m.nowhereElse(img, rel, r.Staging); err != nil {
			return err
		}
	}
	if err := m.stage(ctx, img, r.Staging, r.Access); err != nil {
		return err
	}
	var made undo
	defer func() { made.unless(&err) }()
	target, err := m.newTarget(rel, img.Mode, at, &made)
	if err != nil {
		return err
	}
	defer target.Close()
	return m.show(img, target, r)
}

// nowhereElse is ErrState while a volume is published at another target.
func (m *Manager) nowhereElse(img *image, rel, staging string) error {
	stagingRel, err := m.relative(staging)
	if err != nil {
		return fmt.Errorf("staging_target_path: %w", err)
	}
	places, err := m.places(img)
	if err != nil {
		return err
	}
	for _, at := range places {
		if at != filepath.Join(m.mountPath, rel) && at != filepath.Join(m.mountPath, stagingRel) {
			return fmt.Errorf("%w: volume %s is published at %s; with this access mode it has one target at a time: unpublish it there first", ErrState, img.ID, at)
		}
	}
	return nil
}

// sameAccess is ErrExists if a target allows something else than is asked for.
func (img *image) sameAccess(is, asked Access, target string) error {
	if img.Mode != ModeFilesystem { // the rest is fixed
		is, asked = Access{ReadOnly: is.ReadOnly}, Access{ReadOnly: asked.ReadOnly}
	}
	if is == asked {
		return nil
	}
	return fmt.Errorf("%w: volume %s is published at %q as %s, asked for %s; unpublish it first", ErrExists, img.ID, target, is, asked)
}

// show mounts a staged volume on its target.
func (m *Manager) show(img *image, target *os.File, r PublishRequest) error {
	var what *os.File
	switch img.Mode {
	case ModeDiskImage:
		return m.showImage(img, target, r.Target, r.access())
	case ModeBlock:
		dev, err := m.device(img, r.access().ReadOnly)
		if err != nil {
			return err
		}
		defer dev.Close()
		what = dev.File()
	case ModeFilesystem:
		rel, err := m.relative(r.Staging)
		if err != nil {
			return err
		}
		if what, err = mount.OpenTarget(m.root, rel, syscall.O_DIRECTORY); err != nil {
			return err
		}
		defer what.Close()
	}
	mnt, err := mount.Clone(what)
	if err != nil {
		return err
	}
	defer mnt.Close()
	if img.Mode == ModeFilesystem {
		if err := mnt.SetAttr(r.access().attr()); err != nil {
			return err
		}
	}
	return mnt.Attach(target)
}
