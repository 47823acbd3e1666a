// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package volume is a volume's life on this node: made, staged, published, measured,
// snapshotted, expanded, gone.
//
// A volume is one image in the pool, its record an attribute of that file: both appear in
// one linkat, or neither does. No other state is kept. Whether a volume is attached is what
// the loop devices say, and whether it is published is what the mount table says. After a
// crash the same call, made again, reads both and goes on from there.
//
// A filesystem volume is published as
//
//	template ─FICLONE→ unnamed image ─new UUID, record→ linked ─loop device→
//	detached mount ─move_mount→ target
//
// and everything before the link is held by descriptors alone. A diskImage volume is the
// image itself, bound to the file disk.img in a tmpfs that has room for nothing else, so a
// pod can neither see the pool nor put a file there. A block volume is the node of a loop
// device.
//
// An inline volume goes this way in one call, and back in another (inline.go). A claim goes
// it in steps: its image is made, and durable (claim.go); staged, it is attached and mounted
// once (stage.go); published, that is bound to each target (publish.go). A snapshot is an
// image too, and so is a clone: a copy by FICLONE (copy.go) of a filesystem that is frozen
// meanwhile (freeze.go), with an identity of its own before any kernel can see both. No copy
// depends on its source's name.
//
// What has a secret of its own has a room of its own:
//
//	image   the file: record, integrity, lock, thin and thick
//	place   kubelet's directory and the mount table: targets, pods, whose a mount is
//	device  the loop devices of images
//	space   what the pool has promised, and to whom
//	quota   what pods may ask of the node by inline volumes
//	sweep   what crashes and lost calls leave: look, decide, act
//	errdefs the kinds of error
//
// One operation at a time works on a volume or snapshot: every method that makes, changes,
// moves or removes one takes its lock, and a second one returns [errdefs.ErrBusy]. Work that may outlive its call (copying,
// growing) also holds the lock of the image ([image.Store.Exclusive]). No lock is wider than
// one image.
//
// No process is started here but by [Config].GrowFilesystem.
//
// Sources: CSI 1.13; open(2) O_TMPFILE, ioctl_ficlone(2), loop(4), fsopen(2), move_mount(2),
// openat2(2), fallocate(2), FIFREEZE in fs/ioctl.c.
package volume
