// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package volume is a volume's life on this node: it is made, staged, published, measured,
// snapshotted, expanded and deleted.
//
// A volume is one image in the pool. Its record is an attribute of that file. Both appear in
// one linkat, or neither does. No other state is kept: the loop devices say whether a volume
// is attached, and the mount table says whether it is published. After a crash the same
// call, made again, reads both and goes on from there.
//
// A filesystem volume is published as
//
//	template ─FICLONE→ unnamed image ─new UUID, record→ linked ─loop device→
//	detached mount ─move_mount→ target
//
// Descriptors alone hold everything before the link. So all but record, link and move_mount can be
// done before anybody asks (warmth.go). A diskImage volume is the image itself,
// bound to the file disk.img in a tmpfs that has room for nothing else. So a pod can neither
// see the pool nor put a file there. A block volume is the node of a loop device.
//
// An inline volume is made and published in one call, and unpublished and deleted in another
// (inline.go). A claim takes several calls. One makes its image, durably (claim.go). One
// stages it: attaches it and mounts it once (stage.go). One for each target publishes it:
// binds that mount to the target (publish.go).
//
// A snapshot is an image too, and so is a clone. Both are copies, made by FICLONE (copy.go)
// while the filesystem is frozen (freeze.go). A copy gets an identity of its own before any
// kernel can see both, and never depends on its source's name.
//
// Each secret has a room of its own:
//
//	image   the file: record, integrity, lock, thin and thick, volatile
//	place   kubelet's directory and the mount table: targets, pods, whose a mount is
//	device  the loop devices of images
//	space   what the pool has promised, and to whom
//	quota   what pods may ask of the node by inline volumes
//	warm    volumes that are kept ready before anybody asks for them
//	sweep   what crashes and lost calls leave: look, decide, act
//	errdefs the kinds of error
//
// One operation at a time works on a volume or snapshot: every method that makes, changes,
// moves or removes one takes its lock, and a second one returns [errdefs.ErrBusy]. Work that may outlive its call (copying,
// growing) also holds the lock of the image ([image.Store.Exclusive]). No lock is wider than
// one image.
//
// Only [Config].GrowFilesystem starts processes.
//
// Sources: CSI 1.13; open(2) O_TMPFILE, ioctl_ficlone(2), loop(4), fsopen(2), move_mount(2),
// openat2(2), fallocate(2), FIFREEZE in fs/ioctl.c.
package volume
