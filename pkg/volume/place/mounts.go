// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// DiskSource is the source shown in the mount table for the tmpfs of a
// [image.ModeDiskImage] volume. Only root can make such a mount.
func DiskSource(id string) string { return "csi-disktemplate:" + id }

// Mount is a mount that was proven to be a volume's.
type Mount struct {
	Device   int  // loop index; -1 for a disk image
	Complete bool // false if a publish stopped half-way, or somebody took part of it away
	Access   image.Access

	options string // the filesystem's: [mount.Info]
}

// Identify proves that the mount at a target is the volume's, or returns [ErrForeign]. If
// the target was unmounted meanwhile, it returns [errdefs.ErrState].
func (r *Root) Identify(v Owner, rel string) (Mount, error) {
	at, err := mount.OpenTarget(r.dir, rel, 0)
	if err != nil {
		return Mount{}, err
	}
	defer at.Close()
	return identify(v, at)
}

func identify(v Owner, at *os.File) (Mount, error) {
	info, err := mount.Of(at)
	if err != nil {
		return Mount{}, err
	}
	if info == nil {
		return Mount{}, fmt.Errorf("%w: target path %q was unmounted meanwhile; try again", errdefs.ErrState, at.Name())
	}
	m := Mount{Device: -1, Access: image.AccessOf(info), options: info.Options}
	var ours bool
	switch v.Mode() {
	case image.ModeDiskImage:
		if ours = info.FSType == "tmpfs" && info.Source == DiskSource(v.ID()); ours {
			if img, known := v.(*image.Image); known {
				m.Complete, err = holdsDisk(img, at)
			}
		}
	case image.ModeFilesystem:
		if index, ok := loopdev.IndexOf(info.Source); ok {
			m.Device, m.Complete = index, true
			ours, err = Backs(index, v)
		}
	case image.ModeBlock:
		m, ours, err = identifyNode(v, at)
	}
	if err != nil || ours {
		return m, err
	}
	return Mount{}, fmt.Errorf("%w: %s (%s) is mounted where volume %s belongs; have the operator find out with findmnt whose mount that is, and unmount it: %q",
		ErrForeign, info.Source, info.FSType, v.ID(), at.Name())
}

// identifyNode reports whether a mounted device node is a block volume's. The node of a loop
// device without a file belongs to nobody. It is taken for the volume's, incomplete, because
// unmounting it loses nothing.
func identifyNode(v Owner, node *os.File) (Mount, bool, error) {
	index, ok := loopdev.NodeIndex(node)
	if !ok {
		return Mount{}, false, nil
	}
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return Mount{Device: index}, true, nil
	}
	if err != nil {
		return Mount{}, false, err
	}
	defer dev.Close()
	ours, err := v.Owns(dev)
	if err != nil || !ours {
		return Mount{}, false, err
	}
	readOnly, err := dev.ReadOnly()
	return Mount{Device: index, Complete: true, Access: image.Access{ReadOnly: readOnly}}, true, err
}

// Backs reports whether the volume's image is behind the loop device with this index.
func Backs(index int, v Owner) (bool, error) {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dev.Close()
	return v.Owns(dev)
}

// holdsDisk reports whether disk.img in a volume's tmpfs is the volume's image.
func holdsDisk(img *image.Image, dir *os.File) (bool, error) {
	disk, err := mount.OpenTarget(dir, image.DiskName, 0)
	// From a mount namespace without the bind mount, a pod can put a link there.
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, mount.ErrSymlink) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer disk.Close()
	return img.Is(disk)
}

// Mountpoints are the paths below the root where a volume is mounted, as the mount table
// spells them.
func (r *Root) Mountpoints(img *image.Image) ([]string, error) {
	var loops []int
	if img.Mode() != image.ModeDiskImage {
		var err error
		if loops, err = loopdev.Known(img.File); err != nil {
			return nil, err
		}
	}
	return r.MountpointsOf(img, loops)
}

// MountpointsOf is [Root.Mountpoints] for a caller that knows the volume's loop devices. It reads
// the whole mount table, unless the volume has no device that could be mounted.
func (r *Root) MountpointsOf(v Owner, loops []int) ([]string, error) {
	if len(loops) == 0 && v.Mode() != image.ModeDiskImage {
		return nil, nil
	}
	isOurs := func(device string) bool {
		index, ok := loopdev.IndexOf(device)
		return ok && slices.Contains(loops, index)
	}
	// Of a device both forms have its name: /dev/loop7 as the source, /loop7 as the root.
	texts := []string{DiskSource("")}
	for _, index := range loops {
		texts = append(texts, fmt.Sprint("/loop", index))
	}
	mounts, err := mount.List(func(i *mountinfo.Info) bool {
		var ours bool
		switch v.Mode() {
		case image.ModeDiskImage:
			ours = i.FSType == "tmpfs" && i.Source == DiskSource(v.ID())
		case image.ModeFilesystem:
			ours = isOurs(i.Source)
		case image.ModeBlock: // a bind of the node: its root is the node's path in devtmpfs
			ours = i.FSType == "devtmpfs" && isOurs("/dev"+i.Root)
		}
		return ours && strings.HasPrefix(i.Mountpoint, r.resolved+"/")
	}, texts...)
	if err != nil {
		return nil, err
	}
	var at []string
	for _, i := range mounts {
		at = append(at, i.Mountpoint)
	}
	return at, nil
}

// OpenMountpoint opens the root of the mount at one of a volume's mountpoints.
func (r *Root) OpenMountpoint(at string) (*os.File, error) {
	rel, err := r.RelMounted(at)
	if err != nil {
		return nil, err
	}
	return r.OpenMounted(rel)
}

// OpenFilesystem opens the root of a volume's mounted filesystem for reading. It returns nil
// if the volume is not mounted, or has no filesystem. If something else is mounted above it,
// or if the filesystem has shut down, OpenFilesystem returns [errdefs.ErrState].
func (r *Root) OpenFilesystem(img *image.Image) (*os.File, error) {
	if img.Mode() != image.ModeFilesystem {
		return nil, nil
	}
	places, err := r.Mountpoints(img)
	if err != nil || len(places) == 0 {
		return nil, err
	}
	at, err := r.OpenMountpoint(places[0])
	if err != nil {
		return nil, err
	}
	defer at.Close()
	rel, err := r.RelMounted(places[0])
	if err != nil {
		return nil, err
	}
	m, err := r.Identify(img, rel)
	if errors.Is(err, ErrForeign) {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrState, err)
	}
	if err != nil {
		return nil, err
	}
	if is, err := r.Vitality(m, rel); err != nil {
		return nil, err
	} else if is == ShutDown {
		return nil, fmt.Errorf("%w: the kernel shut down the filesystem of volume %s after an error (see dmesg); delete the pods that have the volume, and try again", errdefs.ErrState, img.ID())
	}
	return mount.Open(at)
}

// CheckOnlyAt returns [errdefs.ErrState] if a volume with these loop devices is mounted
// below the root at another path than the given ones. The error has what, the advice to
// the user, before the long path.
func (r *Root) CheckOnlyAt(v Owner, loops []int, what string, rels ...string) error {
	places, err := r.MountpointsOf(v, loops)
	if err != nil {
		return err
	}
	for _, at := range places {
		if !slices.ContainsFunc(rels, func(rel string) bool { return at == r.mountpoint(rel) }) {
			return fmt.Errorf("%w: volume %s: %s; it is published at %s", errdefs.ErrState, v.ID(), what, at)
		}
	}
	return nil
}

// SettleTime is how long a volume that was just unmounted may still look attached or busy.
// A process that is being started holds a copy of the mount table for some milliseconds, on
// a busy machine for some hundred.
const SettleTime = time.Second

// SettlePoll is the time between two looks at such a volume.
const SettlePoll = 5 * time.Millisecond

// Unmount unmounts one mount of a volume. It retries for a moment if the mount is busy: the
// plugin may have it open for a snapshot or a measurement.
func (r *Root) Unmount(v Owner, rel string) error {
	if v.Mode() == image.ModeDiskImage {
		err := mount.UnmountTarget(r.dir, filepath.Join(rel, image.DiskName))
		if err != nil && !errors.Is(err, mount.ErrNotMounted) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return r.UnmountTop(rel)
}

// UnmountTop takes away the topmost mount at a path, whose the caller knows it is.
func (r *Root) UnmountTop(rel string) error {
	for deadline := time.Now().Add(SettleTime); ; time.Sleep(SettlePoll) {
		err := mount.UnmountTarget(r.dir, rel)
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// Cleared is what a volume had at a path that was cleared.
type Cleared struct {
	Device int // the index of its loop device; -1 if there was none
	// Root is its filesystem, mounted at no path. It is nil if nobody asked for it, or if there
	// was no filesystem.
	Root *mount.Detached
}

// Clear unmounts every mount of a volume at a target, and returns the loop device that it
// was on. A target that is not mounted is fine. A path of the wrong file type is left
// alone, without error. A mount that is not the volume's stays, and returns
// [errdefs.ErrState]. Symbolic links are not followed: if there is one, and the volume is in
// use, Clear returns [errdefs.ErrState] too.
func (r *Root) Clear(v Owner, rel string) (Cleared, error) { return r.clear(v, rel, false) }

// Take is [Root.Clear] that keeps the volume's filesystem mounted, at no path. So nobody can
// reach it there any more, and the caller decides when it ends.
func (r *Root) Take(v Owner, rel string) (Cleared, error) { return r.clear(v, rel, true) }

func (r *Root) clear(v Owner, rel string, take bool) (c Cleared, err error) {
	c.Device = -1
	defer func() {
		if err != nil && c.Root != nil {
			c.Root.Close()
		}
	}()
	for {
		at, err := r.Inspect(rel, v.Mode())
		if img, known := v.(*image.Image); known && errors.Is(err, mount.ErrSymlink) {
			if inUse := r.CheckUnused(img); inUse != nil {
				return c, fmt.Errorf("%w (%v)", inUse, err)
			}
		}
		if errors.Is(err, errdefs.ErrInvalid) {
			return c, nil // no volume can be mounted there
		}
		if err != nil || !at.Mounted {
			return c, err
		}
		if err := r.clearTop(v, rel, take && v.Mode() == image.ModeFilesystem, &c); err != nil {
			return c, err
		}
	}
}

// clearTop unmounts the topmost mount at a path, if it is the volume's.
func (r *Root) clearTop(v Owner, rel string, take bool, c *Cleared) error {
	at, err := mount.OpenTarget(r.dir, rel, 0)
	if err != nil {
		return err
	}
	m, err := identify(v, at)
	if err == nil && take && c.Root == nil {
		c.Root, err = mount.Clone(at)
	}
	at.Close() // while it is open, the mount is busy
	if errors.Is(err, ErrForeign) {
		return fmt.Errorf("%w: %w", errdefs.ErrState, err)
	}
	if err != nil {
		return err
	}
	c.Device = m.Device
	if err := r.Unmount(v, rel); err != nil {
		return fmt.Errorf("volume %s: %w", v.ID(), err)
	}
	return nil
}

// CheckUnused returns [errdefs.ErrState] if a volume is attached or published, or if it is a disk.img
// that is in use: see [Root.CheckDiskUnused].
func (r *Root) CheckUnused(img *image.Image) error {
	deadline := time.Now().Add(SettleTime)
	for {
		loops, err := loopdev.Find(img.File)
		if err != nil {
			return err
		}
		places, err := r.MountpointsOf(img, loops)
		if err != nil {
			return err
		}
		switch {
		case len(places) > 0:
			return fmt.Errorf("%w: volume %s is in use at %s; unpublish and unstage it first", errdefs.ErrState, img.ID(), places[0])
		case len(loops) == 0 && img.Mode() == image.ModeDiskImage:
			return r.CheckDiskUnused(img)
		case len(loops) == 0:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("%w: volume %s is attached as /dev/loop%d, though it is not mounted here: it is staged as a block device, or a process in another mount namespace has a copy of its mount; unstage it, or end that process",
				errdefs.ErrState, img.ID(), loops[0])
		}
		time.Sleep(SettlePoll)
	}
}
