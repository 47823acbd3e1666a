// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package reflink shares extents between files.
//
// [Clone] makes one file the copy-on-write twin of another in time that depends
// on the number of extents, not bytes. It never falls back to copying: a clone
// that takes a minute is a failure that nobody sees.
//
// Whether a filesystem can do this is told by [Try] alone: an xfs made with
// reflink=0 has the same f_type as any other, and btrfs refuses between a file
// with chattr +C and one without.
//
// Caveat: a clone is not durable before its own fsync. On btrfs a crash after
// an fsync of the directory only leaves it with size 0.
//
// Sources: ioctl_ficlone(2), Documentation/filesystems/fiemap.rst.
package reflink
