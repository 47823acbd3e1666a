// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Type is the type of a filesystem: f_type in statfs(2), which has the values.
type Type int64

// Types that callers ask for.
const (
	Btrfs Type = unix.BTRFS_SUPER_MAGIC
	Ext4  Type = unix.EXT4_SUPER_MAGIC
	XFS   Type = unix.XFS_SUPER_MAGIC
	Tmpfs Type = unix.TMPFS_MAGIC
)

var typeNames = map[Type]string{
	Btrfs:                      "btrfs",
	Ext4:                       "ext4",
	XFS:                        "xfs",
	Tmpfs:                      "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlayfs",
	unix.NFS_SUPER_MAGIC:       "nfs",
}

// Name returns the type's name for a message, or "a filesystem" if it is not known here.
func (t Type) Name() string {
	if name := typeNames[t]; name != "" {
		return name
	}
	return "a filesystem"
}

var sharedTypes = []Type{
	unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC,
	unix.CEPH_SUPER_MAGIC, unix.V9FS_MAGIC, unix.FUSE_SUPER_MAGIC, unix.AFS_SUPER_MAGIC, unix.CODA_SUPER_MAGIC,
}

// MayBeShared reports whether other machines may use the same filesystem. Their locks and
// loop devices are not visible here.
func (t Type) MayBeShared() bool { return slices.Contains(sharedTypes, t) }

// Identity tells filesystems apart. Subvolumes of one btrfs have the same Type and
// different IDs. It is comparable.
type Identity struct {
	Type Type
	id   unix.Fsid // f_fsid
}

// Same reports whether two files are on one filesystem, and so share its space. Subvolumes of
// one btrfs are: see BTRFS_IOC_FS_INFO in include/uapi/linux/btrfs.h.
func Same(a, b *os.File) (bool, error) {
	stA, errA := StatusOf(a)
	stB, errB := StatusOf(b)
	if err := errors.Join(errA, errB); err != nil {
		return false, err
	}
	if stA.Type != Btrfs || stB.Type != Btrfs {
		return stA.Identity == stB.Identity, nil
	}
	var idA, idB [16]byte
	if err := errors.Join(btrfsID(a, &idA), btrfsID(b, &idB)); err != nil {
		return false, err
	}
	return idA == idB, nil
}

const btrfsIocFSInfo = 0x8400941f // _IOR(BTRFS_IOCTL_MAGIC, 31, struct btrfs_ioctl_fs_info_args)

func btrfsID(f *os.File, id *[16]byte) error {
	var info struct {
		maxID, devices uint64
		fsid           [16]byte
		_              [1024 - 32]byte
	}
	err := sys.On(f, func(fd int) error {
		if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), btrfsIocFSInfo, uintptr(unsafe.Pointer(&info))); e != 0 {
			return e
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("BTRFS_IOC_FS_INFO %s: %w", f.Name(), err)
	}
	*id = info.fsid
	return nil
}

// Status is what the kernel says about a mounted filesystem.
type Status struct {
	Identity
	Total     int64 // bytes
	Used      int64 // bytes
	Available int64 // bytes that unprivileged users may still write
	// Of inodes; 0 for a filesystem without a fixed number of them, as btrfs.
	Inodes, FreeInodes int64
	BlockSize          int64 // bytes
	ReadOnly           bool  // the mount or the filesystem
}

// StatusAt returns the status of the filesystem that path is on.
//
// "The statfs() system call returns information about a mounted filesystem. path is
// the pathname of any file within the mounted filesystem." statfs(2)
func StatusAt(path string) (Status, error) {
	var st unix.Statfs_t
	if err := sys.Retry(func() error { return unix.Statfs(path, &st) }); err != nil {
		return Status{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return status(&st), nil
}

// StatusOf is [StatusAt] for an open file.
func StatusOf(f *os.File) (Status, error) {
	var st unix.Statfs_t
	if err := sys.On(f, func(fd int) error { return unix.Fstatfs(fd, &st) }); err != nil {
		return Status{}, &os.PathError{Op: "fstatfs", Path: f.Name(), Err: err}
	}
	return status(&st), nil
}

func status(st *unix.Statfs_t) Status {
	return Status{
		Identity:  Identity{Type: Type(st.Type), id: st.Fsid},
		Total:     int64(st.Blocks) * int64(st.Bsize),
		Used:      int64(st.Blocks-st.Bfree) * int64(st.Bsize),
		Available: int64(st.Bavail) * int64(st.Bsize),
		Inodes:    int64(st.Files), FreeInodes: int64(st.Ffree),
		BlockSize: int64(st.Bsize),
		ReadOnly:  st.Flags&unix.ST_RDONLY != 0,
	}
}
