// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/tmpfile"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/pool"
)

// Request asks for an ephemeral volume, published.
type Request struct {
	ID     string
	Target string // absolute path below the kubelet's directory; its parent exists
	Spec   diskfs.Spec
	Mode   Mode
	Access
	Pod Pod
}

// Validate checks a request without looking at the node. Errors are ErrInvalid
// or of [diskfs.Spec.Validate].
func (r Request) Validate() error {
	if err := CheckID(r.ID); err != nil {
		return err
	}
	if !slices.Contains(MountModes, r.Mode) {
		return fmt.Errorf("%w: publishAs %q: must be one of %v", ErrInvalid, r.Mode, MountModes)
	}
	return r.Spec.Validate()
}

// record is what the image of r will say.
func (r Request) record() Record {
	return Record{ID: r.ID, Spec: r.Spec, Mode: r.Mode, Target: r.Target, Access: r.Access, Pod: r.Pod}
}

// sameInline reports how a request differs from the volume that has its id.
func (have Record) sameInline(r Request) error {
	var diff differences
	if !have.Spec.Equal(r.Spec) {
		diff.add("content", have.Spec.String(), r.Spec.String())
	}
	diff.add("lifecycle", have.Lifecycle, Ephemeral)
	diff.add("publishAs", have.Mode, r.Mode)
	diff.add("access", have.Access, r.Access)
	if err := diff.error("volume " + r.ID + "; unpublish it first"); err != nil {
		return err
	}
	// CSI 1.13, NodePublishVolume, the table of target paths: without the
	// capability to be published twice this is FAILED_PRECONDITION.
	if have.Target != r.Target {
		return fmt.Errorf("%w: volume %s is for %s, asked for %s; an inline volume has one target", ErrState, r.ID, have.Target, r.Target)
	}
	return nil
}

// undo is how to take effects back, and does so unless it is told to keep them.
type undo []func() error

// unless takes the effects back, last first, if there is an error, and adds to it
// what went wrong in doing so.
func (u undo) unless(err *error) {
	if *err == nil {
		return
	}
	for _, f := range slices.Backward(u) {
		if e := f(); e != nil {
			*err = fmt.Errorf("%w (and cleaning up after it: %w)", *err, e)
		}
	}
}

// Publish makes an ephemeral volume and attaches it at its target, or finds it
// there and the same. Nothing of what it made is left when it fails; an image
// that an earlier publish made stays for the next.
//
// Errors are ErrInvalid, ErrExists, ErrState, [diskfs.ErrOutOfRange] and ErrLimit of
// what [Limits] does not allow, what [template.Store.Ensure] returns, [pool.ErrFull],
// or the kernel's.
func (m *Manager) Publish(ctx context.Context, r Request) (res Result, err error) {
	if err := r.Validate(); err != nil {
		return res, err
	}
	rel, err := m.relative(r.Target)
	if err != nil {
		return res, err
	}
	// Judged before anything is made, as making it may take a VM.
	at, err := m.look(rel, r.Mode)
	if err != nil {
		return res, err
	}
	var made undo
	defer func() { made.unless(&err) }()

	img, err := m.resume(r, at)
	switch {
	case err == nil:
		defer img.Close()
		res.Existed = true
		if at.mounted {
			if there, err := m.alreadyShown(img, rel); err != nil || there.whole {
				return res, err
			}
			if err := m.unmount(img, rel); err != nil {
				return res, err
			}
		}
		// A publish that died half-way left its image: go on from there.
	case errors.Is(err, ErrNotFound):
		if err := m.ledger.limits.checkSize(r.Spec.Size); err != nil {
			return res, err
		}
		if at.mounted {
			return res, fmt.Errorf("%w: target path %q is a mount point of something else; unpublish or unmount that first", ErrExists, r.Target)
		}
		release, err := m.ledger.reserve(r.ID, r.Pod.Namespace, r.Spec.Size)
		if err != nil {
			return res, err
		}
		defer release()
		if err := m.admitInline(); err != nil {
			return res, err
		}
		if img, res, err = m.create(ctx, r.record()); err != nil {
			return res, err
		}
		defer img.Close()
		if err := m.link(img); err != nil {
			return res, err
		}
		m.ledger.settle(r.ID)
		made = append(made, func() error { return m.unlink(r.ID) })
	default:
		return res, err
	}

	target, err := m.newTarget(rel, r.Mode, at, &made)
	if err != nil {
		return res, err
	}
	defer target.Close()
	if r.Mode == ModeDiskImage {
		return res, m.showImage(img, target, rel, r.Access)
	}
	mnt, err := m.mountImage(img, r.Access)
	if err != nil {
		return res, err
	}
	defer mnt.Close()
	return res, mnt.Attach(target)
}

// link gives a new image its name. From here on the volume exists.
func (m *Manager) link(img *image) error {
	if img.Mode == ModeDiskImage {
		// What has a name is whole, even after a power cut. Attaching a loop device
		// does this for the others, before anything is mounted.
		if err := tmpfile.Sync(img.File); err != nil {
			return pool.Full(err)
		}
	}
	return pool.Full(tmpfile.Link(img.File, m.pool.Volume(img.ID)))
}

// alreadyShown is shown for a target where another's mount is in the way.
func (m *Manager) alreadyShown(img *image, rel string) (shown, error) {
	s, err := m.shown(img, rel)
	if errors.Is(err, errForeign) {
		err = fmt.Errorf("%w: %w", ErrExists, err)
	}
	return s, err
}

// newTarget makes a target, and adds to made how to remove it.
func (m *Manager) newTarget(rel string, mode Mode, at spot, made *undo) (*os.File, error) {
	path := filepath.Join(m.rootPath, rel)
	target, err := m.makeTarget(rel, mode)
	if err != nil {
		return nil, fmt.Errorf("target path %q: %w", path, err)
	}
	if !at.exists {
		*made = append(*made, func() error { return m.removeTarget(rel, mode) })
	}
	// A template may have taken its time: look again.
	mounted, err := mount.IsMountPoint(target)
	if err == nil && mounted {
		err = fmt.Errorf("%w: something was mounted at target path %q meanwhile; unpublish or unmount that first", ErrExists, path)
	}
	if err != nil {
		target.Close()
		return nil, err
	}
	return target, nil
}

// resume opens the image that an earlier publish of the same volume left. It is
// ErrNotFound if there is none that is whole, and what sameInline says if the
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
	if err := img.sameInline(r); err != nil {
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

// mountImage attaches an image and mounts the filesystem in it, nowhere yet. The
// mount holds the loop device, and only the mount.
func (m *Manager) mountImage(img *image, access Access) (*mount.Detached, error) {
	fs, err := diskfs.Lookup(img.Spec.Filesystem)
	if err != nil {
		return nil, err
	}
	dev, err := m.attach(img, loopdev.Options{AutoClear: true})
	if err != nil {
		return nil, err
	}
	defer dev.Close()
	mnt, err := mount.New(mount.Config{FSType: fs.Name, Source: dev.Path(), Data: fs.MountData, Attr: access.attr()})
	if err != nil {
		return nil, fmt.Errorf("mounting volume %s: %w", img.ID, err)
	}
	return mnt, nil
}

// attach returns a loop device of the image: the one it has, or a new one. An
// image that was made a moment ago has none, and is spared the search.
func (m *Manager) attach(img *image, o loopdev.Options) (*loopdev.Device, error) {
	if !img.fresh {
		dev, err := loopdev.OpenBacked(img.File)
		if !errors.Is(err, loopdev.ErrNotAttached) {
			return dev, err
		}
	}
	return m.attachNew(img, o)
}

// attachNew attaches an image.
func (m *Manager) attachNew(img *image, o loopdev.Options) (*loopdev.Device, error) {
	if err := m.pool.Check(); err != nil {
		return nil, err
	}
	o.Name, o.NoDiscard = img.ID, img.Thick
	dev, err := m.loops.Attach(img.File, o)
	if err != nil {
		return nil, pool.Full(fmt.Errorf("attaching volume %s: %w", img.ID, err))
	}
	return dev, nil
}

// Unpublish takes a volume away from its target. An ephemeral one is deleted as
// well. What is not there is fine: the call may be a repetition. A mount at the
// target that is not this volume's is left alone, and is ErrState.
func (m *Manager) Unpublish(id, target string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	rel, err := m.relative(target)
	if err != nil {
		return err
	}
	img, err := m.open(id)
	exists := err == nil
	if errors.Is(err, ErrNotFound) {
		img, err = m.lost(id, rel)
	}
	if err != nil {
		return err
	}
	if exists {
		defer img.Close()
		if img.Lifecycle == Ephemeral && img.Target != target {
			return nil // it is not published there, and stays where it is
		}
	}
	device, err := m.clear(img, rel)
	if err != nil {
		return err
	}
	m.cleanTarget(rel, img.Mode)
	if !exists || img.Lifecycle == Persistent {
		return nil
	}
	m.letGo(img, device)
	return m.unlink(id)
}

// imageSource is the source shown in the mount table for the tmpfs of a
// ModeDiskImage volume. Only root can make one.
func imageSource(id string) string { return "csi-disktemplate:" + id }

// showImage binds the image to disk.img in a tmpfs that has room for the two
// inodes it needs and for no data, so that a pod can put nothing beside it. The
// image itself is an ordinary file in the pod's hands: nothing keeps a pod from
// growing it, but the space of the pool.
func (m *Manager) showImage(img *image, target *os.File, rel string, access Access) error {
	if err := m.pool.Check(); err != nil { // or the image's path may be another's
		return err
	}
	attr := mount.Attr{NoSUID: true, NoDev: true, NoExec: true, ReadOnly: access.ReadOnly}
	dir, err := mount.New(mount.Config{
		FSType: "tmpfs",
		Source: imageSource(img.ID),
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
	named, err := os.OpenFile(m.pool.Volume(img.ID), os.O_RDONLY|syscall.O_NOFOLLOW, 0)
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
		return errors.Join(err, mount.UnmountTarget(m.root, rel))
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
