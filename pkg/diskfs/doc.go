// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package diskfs describes the filesystems that an image may contain: their limits, how to format
// them, how to recognise and verify them, and how to give a copy an identity of its own. It starts
// no program and mounts nothing. It reads and writes a few blocks through [io.ReaderAt] and
// [io.WriterAt].
//
// # Contract
//
// A filesystem is one file and one row of the table in diskfs.go. Every image has 4 KiB blocks and
// 4 KiB sectors, because volumes are attached as loop devices with 4 KiB logical blocks, on which
// nothing smaller can be mounted.
//
// [Filesystem.Verify] is the host's check of a template. It checks everything that the superblocks
// say, in all copies. It returns [ErrCorrupt] for an image that is all zeroes, truncated or torn,
// has another size or label, or was not cleanly unmounted. A failing read is returned as it is, so
// that nobody discards a good template because of a bad cable.
//
// [Filesystem.NewIdentity] makes a clone mountable beside its source. It writes whole 4 KiB blocks
// that it builds from the source's blocks. Those are in the page cache if the source is a template,
// and nothing of the clone is read. It takes 7 µs (btrfs), 33 µs (xfs) and 40 µs (ext4) for 100 GiB
// in the page cache, go test -tags system -bench .
//
// # Caveats
//
// Verify does not replace a filesystem check: it does not read trees, bitmaps and file content. The
// program of [Filesystem.CheckArgs] does, where the image is made.
//
// On ext4 and xfs an image whose journal waits for replay cannot get a new identity ([ErrUnclean]):
// the replay would undo or refuse it. A frozen ext4 is clean. A frozen xfs never is, so a clone of
// its snapshot is mounted once with nouuid, and unmounted, before it gets its own identity.
//
// A NewIdentity that failed may have written some blocks. Discard the clone.
//
// The formatting options assume that the device reads as zeroes where nothing was written, as a new
// sparse file does. See [Filesystem.MkfsArgs].
//
// # Sources
//
// The layouts are those of the Linux kernel:
// ext4: fs/ext4/ext4.h (struct ext4_super_block), Documentation/filesystems/ext4/super.rst;
// xfs: fs/xfs/libxfs/xfs_format.h (struct xfs_dsb), fs/xfs/libxfs/xfs_log_format.h
// (struct xlog_rec_header), fs/xfs/xfs_log_recover.c (xlog_find_head, xlog_check_unmount_rec);
// btrfs: include/uapi/linux/btrfs_tree.h (struct btrfs_super_block), fs/btrfs/disk-io.c
// (btrfs_validate_super). Limits and sizes were measured with e2fsprogs 1.47.0, xfsprogs 6.1.0,
// btrfs-progs 6.2 on Linux 6.18; the tests measure them again.
package diskfs
