// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package place knows where volumes appear on the node: the targets and staging paths below
// kubelet's directory, the mount table, and the pods that kubelet still has.
//
// Every path is resolved beneath kubelet's directory at each use (openat2(2), no symbolic
// links). Before anything is unmounted, it is proven to be the volume's: a filesystem and a
// block device by the inode behind the loop device, a disk image by the source of its
// tmpfs, which only root can set.
//
// Caveat: kubelet and the administrator mount and unmount at the same time. The mount table
// is true only until somebody changes it.
//
// Sources: openat2(2), proc_pid_mountinfo(5), statx(2); the layout of kubelet's root
// directory in k8s.io/kubernetes/pkg/kubelet/kubelet_getters.go.
package place
