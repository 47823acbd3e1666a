// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package disk makes a raw disk of a whole disk that somebody prepared for VMs: a raw or qcow2 file, or an
// image of KubeVirt's form, a containerDisk, which has one such file in /disk.
//
// [Find] takes the file out of an image's layers. [Inspect] says what it is, and how large the disk in it. [Convert]
// writes the disk to an unnamed file, with holes where it has zeros.
//
// A disk from outside may be crafted. [Inspect] reads the headers, in Go and within bounds, and refuses
// what would lead beyond the file: a qcow2 may name any file of the node as its backing file or as its data.
// [Convert] looks again, and runs qemu-img as an unprivileged user in a cage, where there is neither a
// network nor another file: it sees two loop devices, one of them read-only. Nothing here mounts a disk, or
// looks into its partitions.
//
// Caveats: qemu-img is in the package qemu-utils, which only qcow2 needs. A disk that begins with the magic number of
// another format is refused, although a raw disk might begin so by chance.
//
// Sources: docs/interop/qcow2.rst of QEMU, qemu-img(1), qemu-block-drivers(7), tar(5), the layer format of the OCI
// image specification, "containerDisk" in KubeVirt's user guide.
package disk

import "errors"

var (
	// ErrUnusable means that a file is no disk that can be used, and never will be.
	ErrUnusable = errors.New("disk cannot be used")
	// ErrFailed means that the conversion ended without a disk.
	ErrFailed = errors.New("converting the disk failed")
)
