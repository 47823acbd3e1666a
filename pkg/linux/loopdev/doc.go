// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package loopdev attaches files to loop devices: blocks of 4096 bytes, direct
// I/O, nothing else.
//
// Direct I/O is ten times faster, and the kernel silently drops it where it does not fit
// the file. So [Allocator.Attach] checks it afterwards, and fails with [ErrNotDirect].
//
// Only the inode behind a device proves whose device it is: [Find], [OpenBacked] and
// [Device.Backs] compare it. No name is a proof. [Device.Name] is whatever somebody
// chose at the attachment, cut at 63 bytes. [BackingFile] is the path from that
// time, which for an O_TMPFILE stays "(deleted)" for ever. Both are for people to read.
//
// [Find] proves that no device has a file without looking at the devices, by a lease on the
// file (find.go). It looks at all of them only if something has the file open.
//
// Caveats: an autoclear device detaches when its last descriptor, mount or holder goes.
// An open [Device], or a Find that is running, delays that, so look at
// /sys/block/loopN/loop before relying on it. Any process may attach a file to any
// free device at any time. Devices are reused and not removed, since LOOP_CTL_REMOVE
// takes 44 ms. The exceptions are devices that refuse discards, since they can never be
// made to accept them again, and those that a failed attachment has just made.
//
// A device keeps its read-only bit, its write cache mode and its limit of discards when it
// is detached. [Allocator.Attach] sets and checks all three, whoever had the device before:
// see state.go. A device that drops flushes leaves that to the next program that takes it,
// unless [Device.Prepare] is called with the zero Options before the end.
//
// Nodes are opened in a devtmpfs of this process (package devfs), so /dev does not matter.
//
// Sources: loop(4), F_SETLEASE in fcntl(2), fs/locks.c, include/uapi/linux/loop.h, drivers/block/loop.c,
// Documentation/ABI/stable/sysfs-block (logical_block_size, write_cache, discard_max_bytes).
package loopdev
