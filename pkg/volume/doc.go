// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package volume is a volume's life on this node: made, published, measured,
// unpublished, gone.
//
// A volume is one image in the pool, its record an attribute of that file: both
// appear in one linkat, or not at all. No other state is kept. Whether a volume
// is attached is what the loop devices say, whether it is published is what the
// mount table says; after a crash the same call, made again, reads both and
// goes on from there.
//
// A filesystem volume is published as
//
//	template ─FICLONE→ unnamed image ─new UUID, record→ linked ─loop device→
//	detached mount ─move_mount→ target
//
// where everything before the link is held by descriptors alone. The loop
// device clears itself with its last user, so that the mount is the only thing
// that holds it. A diskImage volume is the image itself, bound to the file
// disk.img in a tmpfs that has room for nothing else: a pod can neither see the
// pool nor put a file there. It can grow its disk.img, though, as any file that
// it may write: no limit but the pool's space holds for that.
//
// What is unmounted is proven to be the volume's: a filesystem by the inode behind
// its loop device, a disk image's tmpfs by its source, which only root can give.
//
// No process is started here, and no lock is held; the caller lets one
// operation at a time work on a volume.
//
// Sources: CSI 1.13 NodePublishVolume and NodeUnpublishVolume; open(2)
// O_TMPFILE, ioctl_ficlone(2), loop(4), fsopen(2), move_mount(2), openat2(2).
package volume
