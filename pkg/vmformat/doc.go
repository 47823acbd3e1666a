// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package vmformat formats one file inside a small virtual machine.
//
// [Formatter.Format] boots a kernel with QEMU. The guest runs mkfs, mounts the result
// read-only and checks it. Format returns nil only if every witness of the outcome agrees
// (see judge in verdict.go). The file is then durable. After any error the file's content is
// worthless, and the caller throws it away.
//
// There are three reasons for the VM:
//   - The kernel and the mkfs that make the filesystem are the appliance's own, whatever the
//     node runs.
//   - The kernel that checks the filesystem is not the node's.
//   - Nothing runs as root on the node with options that a user chose.
//
// QEMU gets its disks as file descriptors. It runs as an unprivileged user in a cage without
// network or files and with bounded memory (see pkg/linux/cage), under its own seccomp
// filter. It is killed at a deadline, or when the caller dies. Without root there is no cage,
// and QEMU is an ordinary process of the user who called.
//
// Everything that differs by architecture or accelerator is one value: see machine in
// machine.go.
//
// A [Fill] is what the filesystem is to contain. The guest unpacks it. The node's kernel never sees
// a file of it, only the archives.
//
// [Formatter.Fingerprint] names everything that decides the bytes, by content.
//
// A VM takes much longer to boot than to format most files. So calls that wait for a VM share the
// next one (queue.go), and a VM that has booted is saved, to be restored for later calls (saved.go).
//
// Caveat: the package has no cache of what it formatted. Two calls format twice.
//
// Sources: qemu-system-x86_64(1), QEMU's docs/system/i386/microvm.rst and
// docs/interop/qmp-spec and docs/devel/migration.rst, Documentation/arch/x86/boot.rst,
// Documentation/driver-api/early-userspace/buffer-format.rst.
package vmformat
