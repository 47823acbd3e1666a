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

	"github.com/moby/sys/mountinfo"
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Publish makes an ephemeral volume and attaches it at its target, or finds it
// there and the same. Nothing of what it made is left when it fails; an image
// that an earlier publish made stays for the next.
//
// Errors are ErrInvalid, ErrExists, ErrState, what [template.Store.Ensure]
// returns, [pool.ErrFull], or the kernel's.
func (m *Manager) Publish(ctx context.Context, r Request) (res Result, err error) {
	if err := r.Validate(); err != nil {
		return res, err
	}
	rel, err := m.relative(r.Target)
	if err != nil {
		return res, err
	}
	// Judged before anything is made, as making it may take a VM.
	at, err := m.look(rel)
	if err != nil {
		return res, err
	}

	// Every effect below is undone, last first, unless all of them succeed.
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for i := len(undo) - 1; i >= 0; i-- {
			if e := undo[i](); e != nil {
				err = fmt.Errorf("%w (and cleaning up after it: %w)", err, e)
			}
		}
	}()

	img, err := m.resume(r, at)
	switch {
	case err == nil:
		defer img.Close()
		res.Existed = true
		if at.mounted {
			shown, err := m.shown(img, rel)
			if errors.Is(err, errForeign) {
				return res, fmt.Errorf("%w: %w", ErrExists, err)
			}
			if err != nil || shown.whole {
				return res, err
			}
			if err := mount.Unmount(r.Target); err != nil {
				return res, err
			}
		}
		// A publish that died half-way left its image: go on from there.
	case errors.Is(err, ErrNotFound):
		if at.mounted {
			return res, fmt.Errorf("%w: target path %q is a mount point of something else; unpublish or unmount that first", ErrExists, r.Target)
		}
		if img, res, err = m.create(ctx, r); err != nil {
			return res, err
		}
		defer img.Close()
		if err := m.link(img); err != nil {
			return res, err
		}
		undo = append(undo, func() error { return m.unlink(r.ID) })
	default:
		return res, err
	}

	target, err := mount.MkdirTarget(m.root, rel, 0o750)
	if err != nil {
		return res, fmt.Errorf("target path %q: %w", r.Target, err)
	}
	defer target.Close()
	if !at.exists {
		undo = append(undo, func() error { return mount.RmdirTarget(m.root, rel) })
	}
	// A template may have taken its time: look again.
	if mounted, err := mount.IsMountPoint(target); err != nil {
		return res, err
	} else if mounted {
		return res, fmt.Errorf("%w: something was mounted at target path %q meanwhile; unpublish or unmount that first", ErrExists, r.Target)
	}
	return res, m.show(img, target, r)
}

// resume opens the image that an earlier publish of the same volume left. It is
// ErrNotFound if there is none that is whole, and what conflict says if the
// volume is not the one that is asked for.
func (m *Manager) resume(r Request, at spot) (_ *image, err error) {
	img, err := m.open(r.ID)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			img.Close()
		}
	}()
	if err := img.conflict(r); err != nil {
		return nil, err
	}
	if at.mounted {
		return img, nil
	}
	torn, err := img.torn()
	if err != nil {
		return nil, err
	}
	if !torn {
		return img, nil
	}
	klog.InfoS("Making a volume anew that a power cut has torn", "volume", r.ID)
	if err := m.unlink(r.ID); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("%w: %s", ErrNotFound, r.ID)
}

// spot is what stands at a target path.
type spot struct {
	exists  bool // a directory
	mounted bool // it is the root of a mount
}

// look tells what stands at a target. What cannot become a target is ErrInvalid.
func (m *Manager) look(rel string) (spot, error) {
	parent, err := mount.OpenTarget(m.root, filepath.Dir(rel), syscall.O_DIRECTORY)
	if isPathError(err) {
		return spot{}, fmt.Errorf("%w: the target path's parent directory must exist, without symbolic links: %w", ErrInvalid, err)
	}
	if err != nil {
		return spot{}, err
	}
	parent.Close()
	target, err := mount.OpenTarget(m.root, rel, syscall.O_DIRECTORY)
	if errors.Is(err, os.ErrNotExist) {
		return spot{}, nil
	}
	if isPathError(err) {
		return spot{}, fmt.Errorf("%w: the target path must be a directory, or free for one: %w", ErrInvalid, err)
	}
	if err != nil {
		return spot{}, err
	}
	defer target.Close()
	mounted, err := mount.IsMountPoint(target)
	if errors.Is(err, syscall.EIO) {
		// A filesystem that has shut down answers nothing, but the mount table does.
		var info *mountinfo.Info
		info, err = mount.At(filepath.Join(m.rootPath, rel))
		mounted = info != nil
	}
	return spot{exists: true, mounted: mounted}, err
}

// isPathError reports whether an error is the path's fault and not the machine's.
func isPathError(err error) bool {
	for _, fault := range []error{os.ErrNotExist, mount.ErrSymlink, mount.ErrEscapes, syscall.ENOTDIR, syscall.ENAMETOOLONG, syscall.EINVAL} {
		if errors.Is(err, fault) {
			return true
		}
	}
	return false
}

// show publishes an image at a target.
func (m *Manager) show(img *image, target *os.File, r Request) error {
	if r.Mode == ModeDiskImage {
		return m.showImage(img, target, r)
	}
	dev, err := m.attach(img)
	if err != nil {
		return pool.Full(fmt.Errorf("attaching volume %s: %w", r.ID, err))
	}
	// From here the mount holds the device; without one it clears itself.
	defer dev.Close()
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return err
	}
	mnt, err := mount.New(mount.Config{
		FSType: fs.Name,
		Source: dev.Path(),
		Data:   fs.MountData,
		// A pod's own data may hold anything: no set-uid program and no device
		// node in it takes effect.
		Attr: mount.Attr{NoSUID: true, NoDev: true, ReadOnly: r.ReadOnly, NoATime: r.NoATime},
	})
	if err != nil {
		return fmt.Errorf("mounting volume %s: %w", r.ID, err)
	}
	defer mnt.Close()
	return mnt.Attach(target)
}

// attach returns a loop device of the image: the one it has, or a new one. An
// image that was made a moment ago has none, and is spared the search.
func (m *Manager) attach(img *image) (*loopdev.Device, error) {
	if !img.fresh {
		dev, err := loopdev.OpenBacked(img.File)
		if !errors.Is(err, loopdev.ErrNotAttached) {
			return dev, err
		}
	}
	return m.loops.Attach(img.File, loopdev.Options{AutoClear: true, Name: img.ID})
}

// imageSource is the source shown in the mount table for the tmpfs of a
// ModeDiskImage volume. Only root can make one.
func imageSource(id string) string { return "csi-disktemplate:" + id }

// showImage binds the image to disk.img in a tmpfs that has room for the two
// inodes it needs and for no data, so that a pod can put nothing beside it. The
// image itself is an ordinary file in the pod's hands: nothing keeps a pod from
// growing it, but the space of the pool.
func (m *Manager) showImage(img *image, target *os.File, r Request) error {
	attr := mount.Attr{NoSUID: true, NoDev: true, NoExec: true, ReadOnly: r.ReadOnly}
	dir, err := mount.New(mount.Config{
		FSType: "tmpfs",
		Source: imageSource(r.ID),
		Data:   []string{"size=4096", "nr_inodes=2", "mode=0755"},
		Attr:   mount.Attr{NoSUID: true, NoDev: true, NoExec: true},
	})
	if err != nil {
		return err
	}
	defer dir.Close()
	point, err := openAt(dir.File(), DiskImageName)
	if err != nil {
		return err
	}
	defer point.Close()
	// By its name: the kernel mounts nothing that was opened as an unnamed file,
	// not even once that has a name (move_mount says ENOENT on 6.18).
	named, err := os.OpenFile(m.pool.Volume(r.ID), os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer named.Close()
	file, err := mount.Clone(named)
	if err != nil {
		return err
	}
	defer file.Close()
	if err := errors.Join(file.SetAttr(attr), dir.SetAttr(attr)); err != nil {
		return err
	}
	if err := dir.Attach(target); err != nil {
		return err
	}
	if err := file.Attach(point); err != nil {
		point.Close() // or it would keep the tmpfs busy
		dir.Close()
		return errors.Join(err, mount.Unmount(r.Target))
	}
	return nil
}

// openAt creates an empty file in an open directory.
func openAt(dir *os.File, name string) (*os.File, error) {
	fd, err := syscall.Openat(int(dir.Fd()), name, syscall.O_CREAT|syscall.O_EXCL|syscall.O_RDONLY|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
