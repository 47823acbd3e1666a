// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package loopdev attaches files to loop devices: blocks of 4096 bytes, direct
// I/O, nothing else.
//
// Direct I/O is a tenfold difference, and the kernel drops it without a word
// where it does not fit the file. So [Allocator.Attach] looks afterwards, and
// fails with [ErrNotDirect].
//
// A device is told by its backing inode, [Find] and [Device.Backs], never by
// the file's name: the kernel keeps the name from the time of the attachment,
// which for an O_TMPFILE stays "(deleted)" for ever, and cuts it at 63 bytes.
//
// Caveats: an autoclear device detaches when the last descriptor, mount or
// holder of it goes, so an open [Device], or a running Find, delays that; look
// at /sys/block/loopN/loop before relying on it. Any process may attach to any
// free device at any time. Devices are used again and not removed, as
// LOOP_CTL_REMOVE takes 44 ms, but for those that refuse discards, which nothing
// can make allow them again.
//
// In a container /dev must be the host's devtmpfs, or new devices do not appear.
//
// Sources: loop(4), include/uapi/linux/loop.h, drivers/block/loop.c,
// Documentation/ABI/stable/sysfs-block (logical_block_size).
package loopdev
