// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package diskfs

// raw is no filesystem but a sparse file, without a template or a VM. Its consumer decides what goes
// inside, so there is nothing to verify, and two of them never clash.
var raw = Filesystem{Name: Disk, MinSize: MiB, MaxSize: MaxSize}
