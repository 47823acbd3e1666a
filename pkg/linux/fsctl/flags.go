// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// NoCOW is FS_NOCOW_FL of linux/fs.h, chattr +C. A directory hands it on to the
// files that are made in it afterwards.
//
// "FS_NOCOW_FL 'C' (since Linux 2.6.39): The file will not be subject to
// copy-on-write updates. This flag has an effect only on filesystems that support
// copy-on-write semantics, such as Btrfs." ioctl_iflags(2)
const NoCOW = 0x00800000

// Compression is FS_COMPR_FL and FS_NOCOMP_FL of linux/fs.h, chattr +c and +m: whether the
// files of a directory are to be compressed. On btrfs the property "compression" is the same;
// clearing the flags removes it (btrfs_fileattr_set in fs/btrfs/ioctl.c). NoCOW cannot be set
// beside them, or in the same call that clears them (check_fsflags, same file).
const Compression = 0x00000004 | 0x00000400

// Flags returns the inode flags of f: FS_IOC_GETFLAGS in ioctl_iflags(2).
func Flags(f *os.File) (int, error) {
	var flags int
	err := sys.On(f, func(fd int) (err error) {
		flags, err = unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("FS_IOC_GETFLAGS %s: %w", f.Name(), err)
	}
	return flags, nil
}

// AddFlags sets inode flags of f and leaves its other flags as they are:
// FS_IOC_SETFLAGS in ioctl_iflags(2).
//
// It is not announced as an effect. It serves to lay out a pool, which a plugin
// does at its start and does again at the next.
func AddFlags(f *os.File, flags int) error {
	return changeFlags(f, func(has int) int { return has | flags })
}

// ClearFlags clears inode flags of f, as [AddFlags] sets them.
func ClearFlags(f *os.File, flags int) error {
	return changeFlags(f, func(has int) int { return has &^ flags })
}

func changeFlags(f *os.File, change func(has int) int) error {
	has, err := Flags(f)
	if err != nil || change(has) == has {
		return err
	}
	err = sys.On(f, func(fd int) error { return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, change(has)) })
	if err != nil {
		return fmt.Errorf("FS_IOC_SETFLAGS %s: %w", f.Name(), err)
	}
	return nil
}
