// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package pool is the directory that holds every image: templates, volumes and
// snapshots on one filesystem that can share extents between files.
//
// [Open] decides whether a directory can be a pool. It looks at the type of the
// filesystem (statfs(2)), then at its identity, which must be the same throughout
// because a FICLONE cannot cross filesystems (f_type and f_fsid), and finally tries a
// FICLONE, because an xfs made with reflink=0 passes the first two. Where the
// directory's filesystem cannot share extents, as ext4 cannot, Open can make an xfs
// in a file there.
//
// The layout, all of it 0700 and root's:
//
//	templates/   one image per key, mode 0400, its record in user.disktemplate
//	volumes/     one image per volume, its record in trusted.disktemplate
//	snapshots/   one image per snapshot, its record in trusted.disktemplate
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
