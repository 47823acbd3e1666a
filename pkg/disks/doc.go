// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package disks makes image files without a pool: for the command format, and for other people's
// tests (pkg/disktest).
//
// A [Source] is a formatted image that nobody writes to, usually a template of a cache directory
// ([pool.OpenCache]). [Source.New] makes a disk of it, with a filesystem identity of its own, so
// that all disks of one source can be mounted at the same time. A disk is a clone where its
// directory is on the source's filesystem and that can share extents; else it is a sparse copy,
// and [Disk].Copied says why. [Make] makes many.
//
// A disk has no name until it is whole. [Disk.Publish] makes it durable and gives it one, so a
// process that ends, however it ends, leaves whole disks or none.
//
// Caveat: a template is read and verified by pkg/template. This package trusts the content of a
// source.
//
// Sources: O_TMPFILE in open(2), ioctl_ficlone(2), linkat(2).
package disks
