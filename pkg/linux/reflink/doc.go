// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package reflink shares extents between files.
//
// [Clone] makes one file a copy-on-write clone of another. The time that it takes depends
// on the number of extents, not of bytes. It never falls back to copying: nobody would
// notice that cloning fails, only that it takes a minute.
//
// Only [Try] tells whether a filesystem can do this: an xfs made with reflink=0 has the
// same f_type as any other, and btrfs refuses to clone between a file with chattr +C and
// one without.
//
// Caveat: a clone is not durable before its own fsync. If only the directory was synced
// before a crash, the clone has size 0 on btrfs.
//
// Source: ioctl_ficlone(2).
package reflink
