// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package quota

import (
	"testing"
	"unsafe"
)

// TestSizes compares the structures with the kernel's. The ioctls have the size in their number.
func TestSizes(t *testing.T) {
	for name, size := range map[string][2]uintptr{
		"fsxattr":        {unsafe.Sizeof(attributes{}), fsIocFSGetXAttr >> 16 & 0x3fff},
		"fs_disk_quota":  {unsafe.Sizeof(diskQuota{}), 112},
		"fs_quota_statv": {unsafe.Sizeof(status{}), 160},
	} {
		if size[0] != size[1] {
			t.Errorf("struct %s has %d bytes, want %d", name, size[0], size[1])
		}
	}
}
