// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

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
	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/loopdev"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
)

// spot is what stands at a target path.
type spot struct {
	exists  bool // something of the kind that is looked for
	mounted bool // it is the root of a mount
}

// look tells what stands at a target, which is to be a directory or, for a block
// device, a file. What cannot become a target is ErrInvalid.
func (m *Manager) look(rel string, mode Mode) (spot, error) {
	parent, err := mount.OpenTarget(m.root, filepath.Dir(rel), syscall.O_DIRECTORY)
	if isPathError(err) {
		return spot{}, fmt.Errorf("%w: the target path's parent directory must exist, without symbolic links: %w", ErrInvalid, err)
	}
	if err != nil {
		return spot{}, err
	}
	parent.Close()
	kind, flags := "directory", syscall.O_DIRECTORY
	if mode == ModeBlock {
		kind, flags = "file", 0
	}
	target, err := mount.OpenTarget(m.root, rel, flags)
	if errors.Is(err, os.ErrNotExist) {
		return spot{}, nil
	}
	if isPathError(err) {
		return spot{}, fmt.Errorf("%w: the target path must be a %s, or free for one: %w", ErrInvalid, kind, err)
	}
	if err != nil {
		return spot{}, err
	}
	defer target.Close()
	mounted, err := mount.IsMountPoint(target)
	if errors.Is(err, syscall.EIO) {
		// A filesystem that has shut down answers nothing, but the mount table does.
		var info *mountinfo.Info
		info, err = mount.Of(target)
		mounted = info != nil
	}
	if err != nil {
		return spot{}, err
	}
	if mode == ModeBlock && !mounted {
		if fi, err := target.Stat(); err != nil || !fi.Mode().IsRegular() {
			return spot{}, fmt.Errorf("%w: the target path of a block volume must be a file, or free for one: %s is neither (%w)", ErrInvalid, target.Name(), syscall.EISDIR)
		}
	}
	return spot{exists: true, mounted: mounted}, nil
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

// makeTarget makes sure that there is a target to mount on, and opens it.
func (m *Manager) makeTarget(rel string, mode Mode) (*os.File, error) {
	if mode == ModeBlock {
		return mount.MkfileTarget(m.root, rel, 0o600)
	}
	return mount.MkdirTarget(m.root, rel, 0o750)
}

// removeTarget removes the empty directory or file that a publish made, or
// kubelet.
func (m *Manager) removeTarget(rel string, mode Mode) error {
	if mode == ModeBlock {
		return mount.RmfileTarget(m.root, rel)
	}
	return mount.RmdirTarget(m.root, rel)
}

// cleanTarget removes a target that is of no more use. That it is still there, if
// it is, harms nobody.
func (m *Manager) cleanTarget(rel string, mode Mode) {
	if err := m.removeTarget(rel, mode); err != nil && !errors.Is(err, os.ErrNotExist) {
		klog.ErrorS(err, "Leaving the target behind", "path", filepath.Join(m.rootPath, rel))
	}
}

// shown is what a mount of ours at a target was found to be.
type shown struct {
	device int    // loop index; -1 for a disk image
	whole  bool   // nothing is missing of it
	access Access // what the mount allows
}

// errForeign means that what is mounted at a target is not the volume.
var errForeign = errors.New("not this volume's mount")

// shown proves that the mount at a target shows the volume's image, and else
// is errForeign. The volume may have lost its image, and with it its record.
func (m *Manager) shown(img *image, rel string) (shown, error) {
	at, err := mount.OpenTarget(m.root, rel, 0)
	if err != nil {
		return shown{}, err
	}
	defer at.Close()
	info, err := mount.Of(at)
	if err != nil {
		return shown{}, err
	}
	if info == nil {
		return shown{}, fmt.Errorf("%w: target path %q was unmounted meanwhile; try again", ErrState, at.Name())
	}
	s := shown{device: -1, access: accessOf(info)}
	var ours bool
	switch img.Mode {
	case ModeDiskImage:
		if ours = info.FSType == "tmpfs" && info.Source == imageSource(img.ID); ours {
			s.whole, err = showsImage(img, at)
		}
	case ModeFilesystem:
		if index, ok := loopdev.IndexOf(info.Source); ok {
			s.device, s.whole = index, true
			ours, err = m.backs(index, img)
		}
	case ModeBlock:
		s, ours, err = m.shownDevice(img, at)
	}
	if err != nil || ours {
		return s, err
	}
	return shown{}, fmt.Errorf("%w: target path %q is a mount of %s (%s), not of volume %s; see with findmnt whose it is and unmount that first",
		errForeign, at.Name(), info.Source, info.FSType, img.ID)
}

// shownDevice tells what a mounted device node is to a block volume. The node of
// a loop device that has no file any more is nobody's: it is taken for the
// volume's own, not whole, since nothing is lost by unmounting it.
func (m *Manager) shownDevice(img *image, node *os.File) (shown, bool, error) {
	index, ok := loopdev.NodeIndex(node)
	if !ok {
		return shown{}, false, nil
	}
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return shown{device: index}, true, nil
	}
	if err != nil {
		return shown{}, false, err
	}
	defer dev.Close()
	ours, err := m.deviceOf(dev, img)
	if err != nil || !ours {
		return shown{}, false, err
	}
	readOnly, err := dev.ReadOnly()
	return shown{device: index, whole: true, access: Access{ReadOnly: readOnly}}, true, err
}

// accessOf reads the attributes of a mount, as opposed to its superblock's.
func accessOf(info *mountinfo.Info) Access {
	options := strings.Split(info.Options, ",")
	has := func(option string) bool { return slices.Contains(options, option) }
	return Access{ReadOnly: has("ro"), NoATime: has("noatime"), NoExec: has("noexec"), SUID: !has("nosuid"), Dev: !has("nodev")}
}

// backs reports whether the volume's image is behind a loop device.
func (m *Manager) backs(index int, img *image) (bool, error) {
	dev, err := loopdev.Open(index)
	if errors.Is(err, loopdev.ErrNotAttached) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer dev.Close()
	return m.deviceOf(dev, img)
}

// deviceOf reports whether an attached device is the volume's. Where the image
// has lost its name, and with it all proof, the name that was given to the device
// stands in for it, if a file that was deleted from the pool's volumes backs it, and
// the id is short enough to be whole there.
func (m *Manager) deviceOf(dev *loopdev.Device, img *image) (bool, error) {
	if img.File != nil {
		return dev.Backs(img.File)
	}
	name, err := dev.Name()
	if err != nil {
		return false, err
	}
	file, err := loopdev.BackingFile(dev.Index())
	if err != nil {
		return false, err
	}
	_, deleted := strings.CutSuffix(file, " (deleted)")
	return deleted && filepath.Dir(file) == filepath.Dir(m.pool.Volume("x")) && name == img.ID && len(name) < loopdev.MaxName, nil
}

// showsImage reports whether disk.img in a volume's tmpfs is its image.
func showsImage(img *image, dir *os.File) (bool, error) {
	if img.File == nil {
		return false, nil
	}
	disk, err := mount.OpenTarget(dir, DiskImageName, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, mount.ErrSymlink) { // a pod can do that from a namespace that lacks the bind
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer disk.Close()
	a, errA := img.Stat()
	b, errB := disk.Stat()
	return os.SameFile(a, b), errors.Join(errA, errB)
}

// letGo is for the device of a volume that was unmounted or detached. It says so
// when something else still holds the volume: a mount namespace that has a copy of
// the mount. The space comes back with that. A thick volume's device is of no use
// to others.
func (m *Manager) letGo(img *image, device int) {
	if device < 0 {
		return
	}
	held, err := m.backs(device, img)
	for deadline := time.Now().Add(settleTime); img.Thick && err == nil && held && time.Now().Before(deadline); {
		time.Sleep(settlePoll)
		held, err = m.backs(device, img)
	}
	if err == nil && held {
		klog.InfoS("An unmounted volume is still held, as by a copy of its mount in another mount namespace; its space is freed when that ends",
			"volume", img.ID, "loopDevice", device)
		return
	}
	if err == nil && img.Thick {
		err = loopdev.Remove(device)
	}
	if err != nil {
		klog.ErrorS(err, "Letting a loop device go", "volume", img.ID, "loopDevice", device)
	}
}

// places are the paths below the kubelet's directory where a volume is mounted,
// as the mount table has them.
func (m *Manager) places(img *image) ([]string, error) {
	var loops []int
	if img.Mode != ModeDiskImage {
		var err error
		if loops, err = loopdev.Find(img.File); err != nil || len(loops) == 0 {
			return nil, err
		}
	}
	return m.placesOf(img, loops)
}

// placesOf is places for one who has looked for the loop devices already.
func (m *Manager) placesOf(img *image, loops []int) ([]string, error) {
	isOurs := func(device string) bool {
		index, ok := loopdev.IndexOf(device)
		return ok && slices.Contains(loops, index)
	}
	mounts, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		var ours bool
		switch img.Mode {
		case ModeDiskImage:
			ours = i.FSType == "tmpfs" && i.Source == imageSource(img.ID)
		case ModeFilesystem:
			ours = isOurs(i.Source)
		case ModeBlock: // a bind of the node: its root is the node's path in devtmpfs
			ours = i.FSType == "devtmpfs" && isOurs("/dev"+i.Root)
		}
		return !ours || !strings.HasPrefix(i.Mountpoint, m.mountPath+"/"), false
	})
	if err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	var at []string
	for _, i := range mounts {
		at = append(at, i.Mountpoint)
	}
	return at, nil
}

// openMounted opens the root of what is mounted at a path, and nothing that is below
// it when it was unmounted meanwhile.
func (m *Manager) openMounted(rel string) (*os.File, error) {
	root, err := mount.OpenTarget(m.root, rel, syscall.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	mounted, err := mount.IsMountPoint(root)
	if err == nil && !mounted {
		err = fmt.Errorf("%w: what was mounted at %q was unmounted meanwhile; try again", ErrState, root.Name())
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

// openPlace is openMounted for one of the places of a volume.
func (m *Manager) openPlace(place string) (*os.File, error) {
	rel, err := filepath.Rel(m.mountPath, place)
	if err != nil {
		return nil, err
	}
	return m.openMounted(rel)
}

// unmount takes one mount of the volume away. A snapshot or a measurement of ours may
// have it open for a moment.
func (m *Manager) unmount(img *image, rel string) error {
	if img.Mode == ModeDiskImage {
		err := mount.UnmountTarget(m.root, filepath.Join(rel, DiskImageName))
		if err != nil && !errors.Is(err, mount.ErrNotMounted) && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for deadline := time.Now().Add(settleTime); ; time.Sleep(settlePoll) {
		err := mount.UnmountTarget(m.root, rel)
		if !errors.Is(err, syscall.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// clear unmounts all that shows a volume at a target, and returns the loop device
// that it was on, or -1. What is not there is fine; a mount that is not the
// volume's is ErrState and stays, and so does what is no target at all: the other
// kind of file. Where a symbolic link leads nobody looks: it is ErrState if the volume
// is in use somewhere, as beside the link.
func (m *Manager) clear(img *image, rel string) (device int, err error) {
	device = -1
	for {
		at, err := m.look(rel, img.Mode)
		if errors.Is(err, mount.ErrSymlink) && img.File != nil {
			if inUse := m.unused(img); inUse != nil {
				return device, fmt.Errorf("%w (%v)", inUse, err)
			}
		}
		if errors.Is(err, ErrInvalid) {
			return device, nil // nothing of ours
		}
		if err != nil || !at.mounted {
			return device, err
		}
		s, err := m.shown(img, rel)
		if errors.Is(err, errForeign) {
			return device, fmt.Errorf("%w: %w", ErrState, err)
		}
		if err != nil {
			return device, err
		}
		device = s.device
		if err := m.unmount(img, rel); err != nil {
			return device, fmt.Errorf("volume %s: %w", img.ID, err)
		}
	}
}

// lost is a volume whose image is gone: there is nothing to tell what it was, but
// what is still mounted of it.
func (m *Manager) lost(id, rel string) (*image, error) {
	img := &image{Record: Record{ID: id, Lifecycle: Persistent, Mode: ModeFilesystem}}
	at, err := mount.OpenTarget(m.root, rel, 0)
	if isPathError(err) {
		return img, nil // nothing of ours
	}
	if err != nil {
		return nil, err
	}
	defer at.Close()
	info, err := mount.Of(at)
	if err != nil || info == nil {
		return img, err
	}
	if info.FSType == "tmpfs" && info.Source == imageSource(id) {
		img.Mode = ModeDiskImage
	} else if fi, err := at.Stat(); err == nil && !fi.IsDir() {
		img.Mode = ModeBlock
	}
	return img, nil
}
