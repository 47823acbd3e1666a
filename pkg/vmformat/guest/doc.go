// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package guest is what runs inside the formatting VM, and the two messages it
// exchanges with the host: a [Job] in the initramfs, a [Verdict] on a small disk.
//
// The product's own binary is /init of that VM ([Main]). It trusts nothing it
// was not told to: the initramfs must be whole (its last entry is [MarkerPath];
// the kernel boots a truncated archive quite happily), disks are found by
// their virtio serial and not by the order in which the kernel names them, and
// from the moment mkfs has returned the template is a read-only block device.
//
// The verdict is written last. A guest that panics, hangs or is killed leaves
// none, and the host treats a missing verdict as a failure.
//
// Sources: Documentation/filesystems/ramfs-rootfs-initramfs.rst,
// finit_module(2), BLKROSET in ioctl_blk(2), Documentation/ABI/stable/sysfs-block
// (serial, stat), reboot(2).
package guest
