// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package place is where a volume shows on the node: the targets and staging paths below
// kubelet's directory, the mount table, and the pods that kubelet still has.
//
// Every path is resolved beneath kubelet's directory at each use (openat2(2), no symbolic
// links), and whatever is unmounted is first proven to be the volume's: a filesystem and a
// block device by the inode behind the loop device, a disk image by the source of its
// tmpfs, which only root can set.
//
// Caveat: kubelet and the administrator mount and unmount at the same time. What the mount
// table says holds only as long as nobody changes it.
//
// Sources: openat2(2), proc_pid_mountinfo(5), statx(2); the layout of kubelet's root
// directory in k8s.io/kubernetes/pkg/kubelet/kubelet_getters.go.
package place
