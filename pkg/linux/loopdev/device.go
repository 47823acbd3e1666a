// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package loopdev

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// BlockSize is the logical block size of every device attached here. A smaller
// one makes the kernel refuse direct I/O on a reflinked xfs file.
const BlockSize = 4096

// ErrNotAttached means that the loop device has no backing file.
var ErrNotAttached = errors.New("the loop device is not attached")

// Device is an open and attached loop device. While it is open its index means
// the same attachment, unless somebody detaches it by force.
type Device struct {
	index int
	file  *os.File
}

// Open opens a device that is attached already, else [ErrNotAttached].
//
// It is open for reading only: that is enough for all ioctls here, and udev
// examines every device again that somebody closes after writing.
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

// openNode opens a device, attached or not. One that is just being detached
// gives ENXIO.
func openNode(index, mode int) (*Device, error) {
	path := pathOf(index)
	f, err := sys.Open(path, func() (int, error) { return unix.Open(path, mode|unix.O_CLOEXEC, 0) })
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: open %s: %w", ErrNotAttached, path, err)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("open %s: %w; in a container, mount the host's /dev", path, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return &Device{index: index, file: f}, nil
}

// OpenBacked opens a device whose backing file is this one, or returns
// [ErrNotAttached]. It is proven to be the one after it was opened: before, it
// could have become another file's.
func OpenBacked(backing *os.File) (*Device, error) {
	indices, err := Find(backing)
	if err != nil {
		return nil, err
	}
	for _, i := range indices {
		d, err := Open(i)
		if errors.Is(err, ErrNotAttached) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if ok, err := d.Backs(backing); err == nil && ok {
			return d, nil
		}
		d.Close()
	}
	return nil, fmt.Errorf("%w: no device has %s", ErrNotAttached, backing.Name())
}

func (d *Device) Path() string { return pathOf(d.index) }
func (d *Device) Index() int   { return d.index }

// File is the open device. It belongs to d.
func (d *Device) File() *os.File { return d.file }

// Close ends the attachment of an autoclear device that nobody else holds, and
// leaves any other attached.
func (d *Device) Close() error { return d.file.Close() }

// Detach detaches the backing file and closes d. If others hold the device, the
// kernel does it when the last of them lets go.
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
	}
	return errors.Join(err, d.Close())
}

// Backs reports whether f is the file behind the device.
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

// ReadOnly reports whether the device refuses writes.
func (d *Device) ReadOnly() (bool, error) {
	status, err := d.status()
	return err == nil && status.Flags&unix.LO_FLAGS_READ_ONLY != 0, err
}

// Keep makes sure that the device stays attached when its last user goes. It is for
// one that [Device.Detach] has left to its other users: the kernel makes it
// autoclear, and it would vanish with them.
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
	return nil
}

// Info is what a device knows of its attachment.
type Info struct {
	Name      string // what [Options].Name was, cut at [MaxName] bytes
	AutoClear bool
	// Of the backing file, as stat(2) has them.
	Device, Inode uint64
}

// Info asks the device.
func (d *Device) Info() (Info, error) {
	status, err := d.status()
	if err != nil {
		return Info{}, err
	}
	return Info{
		Name:      unix.ByteSliceToString(status.File_name[:]),
		AutoClear: status.Flags&unix.LO_FLAGS_AUTOCLEAR != 0,
		Device:    status.Device, Inode: status.Inode,
	}, nil
}

// Name is what [Options].Name was, cut at [MaxName] bytes.
func (d *Device) Name() (string, error) {
	info, err := d.Info()
	return info.Name, err
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

// Sync writes what is dirty in the device's own page cache, where somebody used
// it without a filesystem.
func (d *Device) Sync() error { return sys.Effect("fsync", d.file, unix.Fsync) }

// inode as LOOP_GET_STATUS64 has it. The kernel takes it with the same getattr
// as fstat(2): on btrfs st_dev is the subvolume's own, not what /proc/self/mountinfo
// or the superblock have.
type inode struct{ dev, ino uint64 }

func inodeOf(f *os.File) (inode, error) {
	var st unix.Stat_t
	if err := sys.On(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return inode{}, fmt.Errorf("fstat %s: %w", f.Name(), err)
	}
	return inode{uint64(st.Dev), st.Ino}, nil
}

// status is [ErrNotAttached] on a free device.
//
// "LOOP_GET_STATUS64: Get the status of the loop device." loop(4)
func (d *Device) status() (*unix.LoopInfo64, error) {
	var info *unix.LoopInfo64
	err := sys.On(d.file, func(fd int) (err error) {
		info, err = unix.IoctlLoopGetStatus64(fd)
		return err
	})
	if errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("%w: LOOP_GET_STATUS64 %s: %w", ErrNotAttached, d.Path(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("LOOP_GET_STATUS64 %s: %w", d.Path(), err)
	}
	return info, nil
}

// Attached returns the indices of all devices that have a file, whosever.
func Attached() ([]int, error) {
	nodes, err := existing()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(nodes, func(i int) bool { return !attached(i) }), nil
}

// Find returns the indices of all devices whose backing file is this one,
// whatever it is called now. Devices come and go meanwhile: the answer holds
// for what the caller keeps others from changing.
func Find(backing *os.File) ([]int, error) {
	nodes, err := Attached()
	if err != nil {
		return nil, err
	}
	var found []int
	for _, i := range nodes {
		ok, err := backs(i, backing)
		if errors.Is(err, ErrNotAttached) {
			continue // or just being detached, which nothing is that somebody has open
		}
		if err != nil && attached(i) {
			// Not to know is not to have found: a second attachment of one
			// file is two filesystems on one disk.
			return nil, err
		}
		if ok {
			found = append(found, i)
		}
	}
	return found, nil
}

func backs(index int, f *os.File) (bool, error) {
	d, err := Open(index)
	if err != nil {
		return false, err
	}
	defer d.Close()
	return d.Backs(f)
}

// existing are all loop devices that the kernel has, in no order.
func existing() ([]int, error) {
	dir, err := os.Open("/sys/block")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var nodes []int
	for _, name := range names {
		if i, ok := IndexOf("/dev/" + name); ok {
			nodes = append(nodes, i)
		}
	}
	return nodes, nil
}

// attached looks at sysfs, which disturbs nobody: an open of the device could.
func attached(index int) bool {
	return unix.Access("/sys/block/loop"+strconv.Itoa(index)+"/loop", unix.F_OK) == nil
}

func pathOf(index int) string { return "/dev/loop" + strconv.Itoa(index) }

// NodeIndex returns the number of the loop device that f is a node of. f may be
// open with O_PATH.
func NodeIndex(f *os.File) (int, bool) {
	var st unix.Stat_t
	if err := sys.On(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil || st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return 0, false
	}
	// The minor number is not the index where the module has max_part set.
	rdev := uint64(st.Rdev)
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(rdev), unix.Minor(rdev)))
	if err != nil {
		return 0, false
	}
	return IndexOf("/dev/" + filepath.Base(link))
}

// Direct reports whether a device does direct I/O, as it did when it was attached
// here: the kernel drops it, without a word, when the file no longer allows it.
func Direct(index int) (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/dio", index))
	if errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("%w: %s", ErrNotAttached, pathOf(index))
	}
	return strings.TrimSpace(string(b)) == "1", err
}

// BackingFile is where the kernel says that a device's file is: the name it had
// when it was attached, and " (deleted)" behind it when that is gone. For people,
// and where the file itself is gone.
func BackingFile(index int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/sys/block/loop%d/loop/backing_file", index))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %s", ErrNotAttached, pathOf(index))
	}
	return strings.TrimSuffix(string(b), "\n"), err
}

// IndexOf is the number in a loop device's path: 7 of /dev/loop7. A partition
// is not a loop device.
func IndexOf(path string) (int, bool) {
	digits, ok := strings.CutPrefix(path, "/dev/loop")
	i, err := strconv.Atoi(digits)
	return i, ok && err == nil && i >= 0 && strconv.Itoa(i) == digits
}
