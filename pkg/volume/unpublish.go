// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// Unpublish takes a volume away from its target and deletes it. What is not
// there is fine: the call may be a repetition. A mount at the target that is
// not this volume's is left alone, and is ErrState.
func (m *Manager) Unpublish(id, target string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	rel, err := m.relative(target)
	if err != nil {
		return err
	}
	img, err := m.open(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if img != nil {
		defer img.Close()
		if img.Target != target {
			return nil // it is not published there, and stays where it is
		}
	}
	for {
		at, err := m.look(rel)
		if errors.Is(err, ErrInvalid) {
			break // a file, a link, or no parent: nothing of ours
		}
		if err != nil {
			return err
		}
		if !at.mounted {
			m.removeTarget(rel)
			break
		}
		if img == nil {
			return fmt.Errorf("%w: volume %s does not exist, yet its target path %q is a mount point; see with findmnt whose it is and unmount it by hand", ErrState, id, target)
		}
		shown, err := m.shown(img, rel)
		if errors.Is(err, errForeign) {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
		if err != nil {
			return err
		}
		if err := m.unmount(img, target); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
		reportHeld(img, shown.device)
	}
	if img == nil {
		return nil
	}
	return m.unlink(id)
}

// unmount takes one mount of the volume away.
func (m *Manager) unmount(img *image, target string) error {
	if img.Mode == ModeDiskImage {
		if err := mount.Unmount(filepath.Join(target, DiskImageName)); err != nil && !errors.Is(err, mount.ErrNotMounted) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return mount.Unmount(target)
}

// removeTarget removes the empty directory that Publish made, or kubelet.
func (m *Manager) removeTarget(rel string) {
	if err := mount.RmdirTarget(m.root, rel); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Leaving the target directory behind", "path", filepath.Join(m.rootPath, rel))
	}
}

// shown is what a mount of ours at a target was found to be.
type shown struct {
	device int  // loop index; -1 for a disk image
	whole  bool // nothing is missing of it
}

// errForeign means that what is mounted at a target is not the volume.
var errForeign = errors.New("not this volume's mount")

// shown proves that the mount at a target shows the volume's image, and else
// is errForeign.
func (m *Manager) shown(img *image, rel string) (shown, error) {
	path := filepath.Join(m.rootPath, rel)
	info, err := mount.At(path)
	if err != nil {
		return shown{}, err
	}
	if info == nil {
		return shown{}, fmt.Errorf("%w: target path %q was unmounted meanwhile; try again", ErrState, path)
	}
	if img.Mode == ModeDiskImage && info.FSType == "tmpfs" && info.Source == imageSource(img.ID) {
		whole, err := sameFile(img.File, filepath.Join(path, DiskImageName))
		return shown{device: -1, whole: whole}, err
	}
	if index, ok := loopdev.IndexOf(info.Source); ok && img.Mode == ModeFilesystem {
		if backs, err := backs(index, img.File); err != nil || backs {
			return shown{device: index, whole: true}, err
		}
	}
	return shown{}, fmt.Errorf("%w: target path %q is a mount of %s (%s), not of volume %s; see with findmnt whose it is and unmount that first",
		errForeign, path, info.Source, info.FSType, img.ID)
}

// backs reports whether the image is behind a loop device.
func backs(index int, img *os.File) (bool, error) {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dev.Close()
	return dev.Backs(img)
}

func sameFile(f *os.File, path string) (bool, error) {
	a, err := f.Stat()
	if err != nil {
		return false, err
	}
	b, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) { // a pod can do that from a namespace that lacks the bind
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return os.SameFile(a, b), nil
}

// reportHeld says so when something else still holds an unmounted volume: a
// mount namespace that has a copy of the mount. The space comes back with it.
func reportHeld(img *image, device int) {
	if device < 0 {
		return
	}
	if held, err := backs(device, img.File); err == nil && held {
		klog.InfoS("An unpublished volume is still held, as by a copy of its mount in another mount namespace; its space is freed when that ends",
			"volume", img.ID, "loopDevice", device)
	}
}
