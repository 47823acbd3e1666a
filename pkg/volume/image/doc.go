// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package image is the file behind a volume or a snapshot: its record, its integrity, how it
// gets its content, and who may change it as a whole.
//
// The record is an extended attribute of the file, as versioned JSON. An image is made in
// two steps: an unnamed file gets its content ([Store.New], [Provisioning.Fill]), then its
// record and its name ([Store.Link], [Store.Publish]). Both become visible in one
// linkat(2), or neither does. So a file with a name is always a whole volume, except after
// a power cut: see [Image.Torn] and, for volatile volumes, [Record.OfAnotherBoot].
//
// Copying and growing may outlive the call that asked for them. So everybody who copies an
// image as a whole, or changes all of it, holds its lock ([Store.Exclusive]). The lock is a
// flock(2), so it ends with its process.
//
// Caveat: a pod that was given its image as disk.img may write, shorten and enlarge the file
// like any other. Its record is safe: it is in the trusted namespace of xattr(7).
//
// Sources: open(2) O_TMPFILE, ioctl_ficlone(2), fallocate(2), flock(2), xattr(7).
package image
