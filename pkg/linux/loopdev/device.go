// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/devfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// BlockSize is the logical block size of every device that is attached here. With smaller
// blocks the kernel refuses direct I/O on a reflinked xfs file.
const BlockSize = 4096

// ErrNotAttached means that the loop device has no backing file.
var ErrNotAttached = errors.New("the loop device is not attached")

// Device is an open and attached loop device. While it is open, its index stands for the
// same attachment, unless somebody detaches it by force.
type Device struct {
	index int
	file  *os.File
}

// Open opens a device that is attached. A free one returns [ErrNotAttached].
//
// The device is open for reading only. That is enough for all ioctls here, and udev
// examines a device again whenever somebody closes it who could write to it.
func Open(index int) (*Device, error) {
	d, err := openNode(index, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	if _, err := d.status(); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// openNode opens a device, attached or not. A device that is being detached at this
// moment returns ENXIO, and one that was removed ENOENT.
func openNode(index, mode int) (*Device, error) {
	f, err := devfs.Open(nameOf(index), mode)
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: %w", ErrNotAttached, err)
	}
	if err != nil {
		return nil, err
	}
	return &Device{index: index, file: f}, nil
}

// Path is the path of the device's node, as it is where /dev is the kernel's devtmpfs:
// /dev/loop7. See package devfs.
func (d *Device) Path() string { return pathOf(d.index) }

// Index is the number in the device's path.
func (d *Device) Index() int { return d.index }

// File is the open device. It belongs to d.
func (d *Device) File() *os.File { return d.file }

// Close detaches an autoclear device that nobody else holds. Any other device stays
// attached.
func (d *Device) Close() error { return d.file.Close() }

// Detach detaches the backing file and closes d. If others hold the device, the
// kernel detaches the file when the last of them lets go. Until then a read-only device
// stays so, and afterwards its bit is left to the next attachment.
//
// "LOOP_CLR_FD: Disassociate the loop device from any file descriptor." loop(4)
func (d *Device) Detach() error {
	err := sys.Effect("LOOP_CLR_FD", d.file, func(fd int) error {
		_, err := unix.IoctlRetInt(fd, unix.LOOP_CLR_FD)
		return err
	})
	switch {
	case errors.Is(err, unix.ENXIO):
		err = fmt.Errorf("%w: LOOP_CLR_FD %s: %w", ErrNotAttached, d.Path(), err)
	case err != nil:
		err = fmt.Errorf("LOOP_CLR_FD %s: %w", d.Path(), err)
	default:
		err = d.leaveWritable()
	}
	return errors.Join(err, d.Close())
}

// Backs reports whether f is the file behind the device: whether it is the same inode.
// This is the proof of whose device it is.
func (d *Device) Backs(f *os.File) (bool, error) {
	want, err := inodeOf(f)
	if err != nil {
		return false, err
	}
	status, err := d.status()
	if err != nil {
		return false, err
	}
	return inode{status.Device, status.Inode} == want, nil
}

// Keep makes sure that the device stays attached when its last user goes. It takes back a
// [Device.Detach] for which the kernel waits for other users: until then the device is
// autoclear, and would be detached when they are gone.
func (d *Device) Keep() error {
	status, err := d.status()
	if err != nil || status.Flags&unix.LO_FLAGS_AUTOCLEAR == 0 {
		return err
	}
	status.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	err = sys.Effect("LOOP_SET_STATUS64", d.file, func(fd int) error { return unix.IoctlLoopSetStatus64(fd, status) })
	if err != nil {
		return fmt.Errorf("LOOP_SET_STATUS64 %s: %w", d.Path(), err)
	}
	seen.lend(d.index, nil)
	return nil
}

// Info describes an attachment.
type Info struct {
	Name      string // see [Device.Name]
	AutoClear bool
	// The backing file's, as in stat(2): the proof of which file it is.
	Device, Inode uint64
	// Whole means that the device shows all of its file, and not a part (losetup --offset).
	Whole bool
}

// Info asks the device for its attachment.
func (d *Device) Info() (Info, error) {
	status, err := d.status()
	if err != nil {
		return Info{}, err
	}
	return Info{
		Name:      unix.ByteSliceToString(status.File_name[:]),
		AutoClear: status.Flags&unix.LO_FLAGS_AUTOCLEAR != 0,
		Device:    status.Device, Inode: status.Inode,
		Whole: status.Offset == 0 && status.Sizelimit == 0,
	}, nil
}

// UpdateSize makes the device as large as its file is now.
//
// "LOOP_SET_CAPACITY: Resize a live loop device. One can change the size of the
// underlying backing store and then use this operation so that the loop driver
// learns about the new size." loop(4)
func (d *Device) UpdateSize() error {
	err := sys.Effect("LOOP_SET_CAPACITY", d.file, func(fd int) error {
		_, err := unix.IoctlRetInt(fd, unix.LOOP_SET_CAPACITY)
		return err
	})
	if err != nil {
		return fmt.Errorf("LOOP_SET_CAPACITY %s: %w", d.Path(), err)
	}
	return nil
}

// Sync writes out the device's own page cache, in which somebody who uses the device
// without a filesystem leaves dirty data.
//
// "fsync() transfers ("flushes") all modified in-core data of (i.e., modified buffer
// cache pages for) the file referred to by the file descriptor fd to the disk device"
// fsync(2)
func (d *Device) Sync() error { return sys.Effect("fsync", d.file, unix.Fsync) }

// InUse reports whether a filesystem is mounted from the device, or somebody else has claimed it for itself. It claims the
// device itself for that moment.
//
// "On Linux 2.6 and later, O_EXCL can be used without O_CREAT if pathname refers to a block device. If the block device is
// in use by the system (e.g., mounted), open() fails with the error EBUSY." open(2)
func (d *Device) InUse() (bool, error) {
	f, err := devfs.Open(nameOf(d.index), unix.O_RDONLY|unix.O_EXCL)
	if errors.Is(err, unix.EBUSY) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, f.Close()
}

// inode identifies a file as LOOP_GET_STATUS64 does. The kernel uses the same getattr
// as for fstat(2): on btrfs st_dev is the subvolume's own, and differs from that in
// /proc/self/mountinfo and in the superblock.
type inode struct{ dev, ino uint64 }

func inodeOf(f *os.File) (inode, error) {
	var st unix.Stat_t
	if err := sys.On(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return inode{}, fmt.Errorf("fstat %s: %w", f.Name(), err)
	}
	return inode{uint64(st.Dev), st.Ino}, nil
}

// status returns the attachment, or [ErrNotAttached] for a free device.
//
// "LOOP_GET_STATUS64: Get the status of the loop device." loop(4)
func (d *Device) status() (*unix.LoopInfo64, error) {
	var info *unix.LoopInfo64
	err := sys.On(d.file, func(fd int) (err error) {
		info, err = unix.IoctlLoopGetStatus64(fd)
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		seen.forget(d.index)
		return nil, fmt.Errorf("%w: LOOP_GET_STATUS64 %s: %w", ErrNotAttached, d.Path(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("LOOP_GET_STATUS64 %s: %w", d.Path(), err)
	}
	seen.set(d.index, inode{info.Device, info.Inode})
	return info, nil
}

func nameOf(index int) string { return "loop" + strconv.Itoa(index) }

func pathOf(index int) string { return "/dev/" + nameOf(index) }

// NodeIndex returns the number of the loop device that f is a node of. f may be
// open with O_PATH.
func NodeIndex(f *os.File) (int, bool) {
	var st unix.Stat_t
	if err := sys.On(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	// The minor number differs from the index if the module has max_part set.
	rdev := uint64(st.Rdev)
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	if err != nil {
		return 0, false
	}
	return IndexOf("/dev/" + filepath.Base(link))
}

// Direct reports whether a device still does direct I/O, as it did when it was attached
// here. The kernel silently drops it when the file no longer allows it.
func Direct(index int) (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/dio", index))
	if errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("%w: %s", ErrNotAttached, pathOf(index))
	}
	return strings.TrimSpace(string(b)) == "1", err
}

// BackingFile returns the path of a device's file as the kernel shows it: the path from
// the time of the attachment, with " (deleted)" behind it if that is gone. It is for people
// to read and proves nothing: another file may have the path by now. See [Find].
func BackingFile(index int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", index))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %s", ErrNotAttached, pathOf(index))
	}
	return strings.TrimSuffix(string(b), "\n"), err
}

// IndexOf returns the number in a loop device's path: 7 for /dev/loop7. ok is false for
// any other path, such as that of a partition.
func IndexOf(path string) (index int, ok bool) {
	digits, ok := strings.CutPrefix(path, "/dev/loop")
	index, err := strconv.Atoi(digits)
	return index, ok && err == nil && index >= 0 && strconv.Itoa(index) == digits
}
