// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pool is the directory that holds every image: templates, volumes, snapshots
// and goldens on one filesystem that can share extents between files.
//
// [Open] decides whether a directory can be a pool. It looks at the type of the
// filesystem (statfs(2)), then at its identity, which must be the same throughout
// because a FICLONE cannot cross filesystems (f_type and f_fsid), and finally tries what a
// volume will need: a FICLONE, which an xfs made with reflink=0 refuses, attached to a loop
// device with direct I/O, which one with large blocks refuses. Or it makes the pool an xfs
// in a sparse file, on any filesystem: the loopback pool.
//
// [OpenCache] opens a directory for templates alone, on any filesystem and for any user.
//
// A pool has what its layers have: its own filesystem and, where that is on a loop device, the
// filesystem below it that holds the device's file. [Pool.Space] is the least of them,
// [Pool.Reserve] reserves space through all of them, and [Pool.Trim] returns it.
//
// The layout, all of it 0700 and root's:
//
//	templates/   one image per key, mode 0400, its record in user.disktemplate
//	volumes/     one image per volume, its record in trusted.disktemplate
//	snapshots/   one image per snapshot, its record in trusted.disktemplate
//	goldens/     one image per generation of a golden, its record in trusted.disktemplate; its
//	             mtime is when the generation was last used
//	commits/     images of volumes that are gone, and are to become generations of goldens
//	locks/       one lockfile per template key; never deleted, see pkg/linux/flock; its
//	             mtime is when the template was last used, see [Pool.Touch]
//	cache/       files that can be made again: the unpacked kernel
//
// On btrfs the image directories are NOCOW (chattr +C): without it random
// writes are ten times slower and fragment an image within seconds. Both sides
// of a FICLONE must agree on the flag, so it is set while both are empty.
//
// Volume records are in the trusted namespace because a pod that was given its
// image as disk.img holds a descriptor to the file, and whoever may write a file
// may rewrite its user attributes. See xattr(7).
//
// Caveat: the package knows names and space, and nothing of the content of an image.
package pool
