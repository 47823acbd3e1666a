// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package guest is the part of the product that runs inside the formatting VM, with the two
// messages that it exchanges with the host: a [Job] in the initramfs, and a [Verdict] on a
// small disk.
//
// The product's own binary is /init of that VM ([Main]). It checks everything that it
// depends on. The initramfs must be whole, with [MarkerPath] as its last entry, because the
// kernel also boots a truncated archive. Disks are found by their virtio serial, not by the
// order in which the kernel names them. Once mkfs has returned, the template is a read-only
// block device.
//
// The verdict is written last. A guest that panics, hangs or is killed leaves no verdict, and
// the host treats a missing verdict as a failure.
//
// Sources: Documentation/filesystems/ramfs-rootfs-initramfs.rst,
// finit_module(2), BLKROSET in ioctl_blk(2), Documentation/ABI/stable/sysfs-block
// (serial, stat), reboot(2).
package guest
