// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package devfs finds the kernel's device nodes, whatever /dev is.
//
// The kernel keeps a node of every device in one filesystem, devtmpfs. On most machines it is
// mounted at /dev. In a container /dev is a tmpfs instead, with copies of the nodes that there
// were when the container started. New loop devices do not appear there. A node of kind or
// minikube is such a container, and mounting its /dev into a pod does not help.
//
// So this process has mounts of devtmpfs that nobody else sees, and that end with it. [Open]
// opens nodes in one that is mounted nowhere. Some system calls take a node's path, and the
// mount table shows that path ever after. [At] makes them where the path leads to the
// kernel's node: in a mount namespace that holds a devtmpfs at /dev and nothing else, unless
// this process has it at /dev already.
//
// The paths /proc/self/fd/N/loop7 would need no mount namespace. But the mount table would
// then show a path that means something else to everybody else; btrfs opened another path
// than it was given on Linux 6.12 to 6.14 (the commit "btrfs: canonicalize the device path
// before adding it", and its revert); and a node on a mount without a namespace cannot be
// bind-mounted before Linux 6.15.
//
// All of it needs CAP_SYS_ADMIN, and not in a user namespace: devtmpfs lacks FS_USERNS_MOUNT.
//
// Sources: drivers/base/devtmpfs.c, mount_namespaces(7), setns(2), open_tree(2).
package devfs
