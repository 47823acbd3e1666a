// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mount makes mounts that have no place yet, and puts them into one.
//
// A [Detached] mount, from [New] or [Clone], is a file descriptor. Until
// [Detached.Attach] no path leads to it, and when the process dies the kernel
// takes it back. Attaching costs microseconds, and where the parent is a shared
// mount the new one propagates by itself, as mount_namespaces(7) says.
//
// Targets are descriptors too: [OpenTarget] and [MkdirTarget] follow no symbolic
// link and leave no root, so that what is checked is what is mounted on, and so
// does [UnmountTarget].
//
// Caveats: an open descriptor below a mount, a Detached's own included, keeps
// [UnmountTarget] from succeeding. A descriptor that was opened before something was
// mounted on it still refers to what is below. Needs Linux 5.12.
//
// Sources: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2),
// mount_setattr(2), openat2(2), statx(2), umount(2),
// Documentation/filesystems/mount_api.rst.
package mount
