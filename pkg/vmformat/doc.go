// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package vmformat formats one file inside a small virtual machine.
//
// [Formatter.Format] boots a kernel with QEMU, has it run mkfs, mount the result
// read-only and check it, and returns nil only if everything that can witness
// the outcome agrees (see judge in verdict.go). The file is then durable. On any
// error its content is worthless and the caller throws it away.
//
// The VM is there for three reasons: the kernel and the mkfs that made the
// filesystem are the appliance's own, whatever the node runs; the kernel that
// checks it is not the node's; and nothing runs as root on the node over options
// that a user chose. QEMU gets its disks as file descriptors, runs as an
// unprivileged user in a cage without network or files and with bounded memory
// (see pkg/linux/cage), under its own seccomp filter, and is killed at a deadline or
// when the caller dies. Without root there is no cage, and QEMU is just another process of the
// user who called.
//
// [Formatter.Fingerprint] names, by content, everything that decides the bytes.
//
// Caveat: the package knows no cache. Two calls make two machines.
//
// Sources: qemu-system-x86_64(1), QEMU's docs/system/i386/microvm.rst and
// docs/interop/qmp-spec, Documentation/arch/x86/boot.rst,
// Documentation/driver-api/early-userspace/buffer-format.rst.
package vmformat
