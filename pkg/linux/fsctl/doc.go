// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package fsctl asks things of a mounted filesystem through an open file or
// directory on it: write everything, stand still, grow.
//
// Which filesystem it is is asked of the kernel, fstatfs(2), and not of the
// caller: the ioctls of one mean something else to another.
//
// Caveats: a frozen filesystem stays so when the process that froze it dies, and
// everything that writes to it waits, umount(2) included. Whoever calls [Freeze]
// must be sure to call [Thaw]. Growing ext4 while it is mounted needs
// CAP_SYS_RESOURCE, see [MayGrow].
//
// Sources: syncfs(2), ioctl_fsfreeze in fsfreeze(8) and fs/ioctl.c, BTRFS_IOC_RESIZE
// in include/uapi/linux/btrfs.h, XFS_IOC_FSGROWFSDATA in fs/xfs/libxfs/xfs_fs.h,
// EXT4_IOC_RESIZE_FS in include/uapi/linux/ext4.h.
package fsctl
