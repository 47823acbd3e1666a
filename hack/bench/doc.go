// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Command bench measures the plugin beside what it could be, and beside what people do without it, in one run.
//
// It starts the real binary on pools that it makes for itself, and makes kubelet's calls over gRPC. It knows the plugin
// by its command line, its flags and CSI, and nothing of its packages. Beside the plugin it runs, turn by turn and in
// random order, other ways to a mounted filesystem: the same system calls made straight (the floor), a new filesystem by
// mkfs for each volume (the habit), a copy of a formatted image by cp --reflink (the other habit), an emptyDir, and any
// other CSI driver whose socket BENCH_PEER_SOCKET names. Inside volumes it compares synced ones, volatile ones, an emptyDir
// and a tmpfs. Volumes that are born with a content, or start from a golden, take turns with empty ones, and the VM
// that unpacks a content with one that runs a usual tar. Noise hits all of them alike, so ratios travel better than times.
//
// What is measured, and how good it should be, is a table in cases.go. A measurement only records numbers. What they
// come to is computed afterwards (report.go), and written as a table, as JSON and as plots.
//
// The program starts itself again in a mount namespace of its own. Mounts and autoclear loop devices end with that
// namespace, even if the process is killed. What else is left, the first process removes: see supervise.
package main
