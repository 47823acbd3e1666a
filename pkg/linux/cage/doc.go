// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package cage runs a program that can reach nothing but what it was given.
//
// The program runs as an unprivileged user in mount, network, IPC, UTS and PID
// namespaces of its own. Its root is a read-only tmpfs with the named read-only
// binds, files and device nodes, and nothing else of the machine. It does not even refer
// to another mount, so a running cage never keeps a volume's superblock
// alive. It cannot gain privileges by execve(2), and it dies with its parent. [Limits]
// bound its memory, processor time and descriptors.
//
// Two limits are not used. RLIMIT_NPROC counts all processes of a user, including those of
// any pod that runs under the same number, so a pod could keep the program from
// starting. RLIMIT_FSIZE would apply to the images as well. So the content of a
// program's unnamed files (memfd_create(2)) is for its cgroup to bound.
//
// Caveat: the parent-death signal and the mount namespace belong to an operating
// system thread, not to a process. So each cage keeps one thread locked while it runs,
// which ends with it.
//
// Sources: namespaces(7), mount_namespaces(7), pid_namespaces(7), pivot_root(2), mknod(2),
// PR_SET_PDEATHSIG and PR_SET_NO_NEW_PRIVS in prctl(2), prlimit(2).
package cage
