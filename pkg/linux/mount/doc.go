// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package mount makes mounts that no path leads to yet, and attaches them.
//
// A [Detached] mount, from [New] or [Clone], is a file descriptor. No path leads to it
// until [Detached.Attach], and if the process dies before, the kernel unmounts it.
// Attaching costs microseconds. Where the parent is a shared mount, the new mount
// propagates by itself, see mount_namespaces(7).
//
// [Of], [At] and [Holding] describe a mount. Linux 6.13 and newer tell that about one mount
// (statmount(2)). Older kernels have it only in the list of all mounts, /proc/self/mountinfo,
// which takes longer to read with each of them.
//
// Targets are descriptors too. [OpenTarget] and [MkdirTarget] follow no symbolic link and
// do not leave their root, so that the file that was checked is the one that is mounted
// on. [UnmountTarget] finds its target in the same way.
//
// Caveats: an open descriptor on a mount, a Detached's own included, keeps
// [UnmountTarget] from succeeding. A descriptor that was opened before something was
// mounted on its file still refers to that file, below the mount. Needs Linux 5.12.
//
// Sources: fsopen(2), fsconfig(2), fsmount(2), open_tree(2), move_mount(2),
// mount_setattr(2), openat2(2), statx(2), statmount(2), umount(2),
// Documentation/filesystems/mount_api.rst.
package mount
