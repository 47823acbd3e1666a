// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package guest is the part of the product that runs inside the formatting VM, with the messages
// that it exchanges with the host: a [Setup] in the initramfs, and on a small disk a [Batch] of
// jobs, with a [Verdict] for each of them.
//
// The product's own binary is /init of that VM ([Main]). It checks everything that it
// depends on. The initramfs must be whole, with [MarkerPath] as its last entry, because the
// kernel also boots a truncated archive. Disks are found by their virtio serial, not by the
// order in which the kernel names them. Once mkfs has returned, and a content is unpacked, the
// template is a read-only block device.
//
// Before it touches a disk, the guest says that it is ready, and waits for a line on its console.
// There the host may save the VM, to restore it for later batches. The module that shows the disks is
// loaded afterwards: so they are seen as they are then.
//
// A job may have a content: tar archives on a disk of their own, which cannot be written. The guest
// unpacks them into the new filesystem, and trusts nothing in them: see unpacker.
//
// A job's verdict is written last. A guest that panics, hangs or is killed leaves no verdict of
// the jobs that it had not done, and the host treats a missing verdict as a failure.
//
// Sources: Documentation/filesystems/ramfs-rootfs-initramfs.rst,
// finit_module(2), BLKROSET in ioctl_blk(2), Documentation/ABI/stable/sysfs-block
// (serial, stat), random(4), reboot(2), openat2(2), layer.md of the OCI image specification.
package guest
