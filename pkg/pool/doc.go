// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pool is the directory that holds every image: templates and volumes
// on one filesystem that can share extents between files.
//
// [Open] is the gate. A filesystem is judged by its type (statfs(2)), by what
// it is (f_type and f_fsid must be the same throughout, as a FICLONE never
// crosses filesystems), and finally by a trial FICLONE, because an xfs made with
// reflink=0 passes the first two. Where the directory's filesystem cannot share
// extents, as ext4, Open can make an xfs of its own in a file there.
//
// The layout, all of it 0700 and root's:
//
//	templates/   one image per key, mode 0400, its record in user.disktemplate
//	volumes/     one image per volume, its record in trusted.disktemplate
//	snapshots/   one image per snapshot, likewise
//	locks/       one lockfile per template key; never deleted, see [Pool.Lock]; its mtime
//	             is when the template was used last, see [Pool.Touch]
//	cache/       what can be made again: the unpacked kernel
//
// On btrfs the image directories are NOCOW (chattr +C): without it random
// writes are ten times slower and fragment an image within seconds. Both sides
// of a FICLONE must agree on the flag, so it is set while both are empty.
//
// Volume records are in the trusted namespace because a pod that was given its
// image as disk.img holds a descriptor to the file, and whoever may write a file
// may rewrite its user attributes. See xattr(7).
//
// Caveat: the package knows names and space, not what is inside an image.
package pool
