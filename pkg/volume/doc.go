// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package volume is a volume's life on this node: made, staged, published, measured,
// snapshotted, grown, gone.
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
// it may write: no limit but the pool's space holds for that. A block volume is
// the node of a loop device that stays attached until it is unstaged, since a
// bind mount of a node is no user of its device.
//
// An inline volume goes this way in one call, and back in another. A claim
// ([Manager.Create] to [Manager.Delete]) goes it in steps: its image is made, and
// durable; staged, it is attached and mounted once (stage.go); published, that is
// bound to each target (publish_claim.go).
//
// A snapshot is an image too, and so is a clone: copies by FICLONE, of a
// filesystem that stands still meanwhile (freeze.go), with an identity of their
// own before any kernel can see both. No copy depends on its source's name.
//
// What the pool promises to whom is in space.go, what pods may ask of the node by inline
// volumes in quota.go.
//
// What crashes and lost calls leave is looked for, judged and taken away by
// [Manager.Sweep]: plan.go decides and touches nothing, sweep.go looks and acts. It needs
// the pool to be this process's own ([pool.Pool.Own]).
//
// What is unmounted is proven to be the volume's: a filesystem and a device by the
// inode behind the loop device, a disk image's tmpfs by its source, which only
// root can give.
//
// No process is started here but what [Config].Grow starts. The caller lets one
// operation at a time work on a volume; whoever copies an image as a whole, or
// changes it so, holds its lock as well ([Manager.exclusive]), since copying and
// growing may outlive the call that asked for them. No lock is wider than one image.
//
// Sources: CSI 1.13; open(2) O_TMPFILE, ioctl_ficlone(2), loop(4), fsopen(2),
// move_mount(2), openat2(2), fallocate(2), FIFREEZE in fs/ioctl.c.
package volume
