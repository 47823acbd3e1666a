// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package cage starts a program that can reach nothing but what it was given.
//
// The program runs as an unprivileged user in mount, network, IPC, UTS and PID
// namespaces of its own. Its root is a read-only tmpfs with the named read-only
// binds, files and device nodes, and nothing else of the machine: no other
// mount is even referenced, so a running cage never keeps a volume's superblock
// alive. It cannot gain privileges by execve(2) and dies with its parent. What it
// takes of memory, processor and descriptors is bounded by [Limits].
//
// Two limits are left alone. RLIMIT_NPROC counts all processes of a user, those of
// any pod that runs as the same number too: one could keep the program from
// starting. RLIMIT_FSIZE would hold for the images as well. So what a program keeps
// in files without a name (memfd_create(2)) is for its cgroup to bound.
//
// Caveat: the parent-death signal and the mount namespace belong to an operating
// system thread, not to a process, so each cage keeps one locked thread for its
// lifetime, which ends with it.
//
// Sources: namespaces(7), mount_namespaces(7), pid_namespaces(7), pivot_root(2), mknod(2),
// PR_SET_PDEATHSIG and PR_SET_NO_NEW_PRIVS in prctl(2), prlimit(2).
package cage
