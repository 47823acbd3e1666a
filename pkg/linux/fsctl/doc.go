// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package fsctl controls mounted filesystems through an open file or directory on
// them: what they are and how full ([StatusOf]), writing everything out ([Sync]), stopping
// writes ([Freeze]), growing ([Grow]), returning free space ([Trim]), and the flags of an
// inode ([Flags]).
//
// The type of a filesystem comes from the kernel, fstatfs(2), and not from the
// caller: the same ioctl number means different things to different filesystems.
//
// Caveats: a frozen filesystem stays frozen when the process that froze it dies, and
// everything that writes to it waits, umount(2) included. Whoever calls [Freeze]
// must make sure that [Thaw] follows. Growing ext4 while it is mounted needs
// CAP_SYS_RESOURCE, see [MayGrow].
//
// Sources: statfs(2), syncfs(2), ioctl_iflags(2), ioctl_fsfreeze in fsfreeze(8) and
// fs/ioctl.c, BTRFS_IOC_RESIZE in include/uapi/linux/btrfs.h, XFS_IOC_FSGROWFSDATA in
// fs/xfs/libxfs/xfs_fs.h, EXT4_IOC_RESIZE_FS in include/uapi/linux/ext4.h, FITRIM in fstrim(8).
package fsctl
