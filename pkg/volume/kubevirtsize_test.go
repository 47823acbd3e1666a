// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

//go:build system

package volume

import (
	"path/filepath"
	"syscall"
	"testing"

	"github.com/csi-disktemplate/csi-disktemplate/internal/testenv"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/diskfs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/size"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// TestSizeByKubeVirt calculates the size that KubeVirt gives to a disk.img of a VM that runs, as docs/kubevirt.md says. Only
// a thick one with an overhead of 0 keeps its size, however full the pool is.
func TestSizeByKubeVirt(t *testing.T) {
	const has, overhead = 256 * mib, 0.06 // CDI's default
	for _, kind := range testenv.PoolKinds {
		t.Run(kind.Name, func(t *testing.T) {
			n := newNode(t, kind, 2*gib)
			volumes := map[image.Provisioning]image.Record{}
			paths := map[image.Provisioning]string{}
			for _, p := range []image.Provisioning{image.Thin, image.Thick} {
				r := ClaimRequest{Name: "disk-" + p.String(), Spec: diskfs.Spec{Filesystem: "raw", Size: has}, Mode: image.ModeDiskImage, Provisioning: p}
				volumes[p] = n.mustCreate(r)
				paths[p] = filepath.Join(n.mustPublishClaim(volumes[p], "pod"), image.DiskName)
			}
			for p, path := range paths {
				if got := sizeByKubeVirt(t, path, has, 0); got != has {
					t.Errorf("%s, with room in the pool: %s, want %s", p, size.Format(got), size.Format(has))
				}
				if got := sizeByKubeVirt(t, path, has, overhead); got >= has {
					t.Errorf("%s, with CDI's overhead: %s", p, size.Format(got))
				}
			}
			testenv.Fill(t, n.pool.Root())
			if got := sizeByKubeVirt(t, paths[image.Thin], has, 0); got >= has/2 {
				t.Errorf("a thin one in a full pool: %s", size.Format(got))
			}
			if got := sizeByKubeVirt(t, paths[image.Thick], has, 0); got != has {
				t.Errorf("a thick one in a full pool: %s, want %s", size.Format(got), size.Format(has))
			}
			for _, v := range volumes {
				n.mustEnd(v, "pod")
			}
		})
	}
}

// sizeByKubeVirt is a part of the claim's size, or of what its file has allocated and statfs calls free, if that is less.
func sizeByKubeVirt(t *testing.T, path string, claim int64, overhead float64) int64 {
	t.Helper()
	var st syscall.Stat_t
	var fs syscall.Statfs_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Statfs(path, &fs); err != nil {
		t.Fatal(err)
	}
	return int64((1 - overhead) * float64(min(claim, st.Blocks*512+int64(fs.Bavail)*fs.Bsize)))
}
