// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"
	"os"
	"syscall"

	"k8s.io/klog/v2"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/sparse"
)

// Usage is what a published volume has and uses.
type Usage struct {
	TotalBytes, UsedBytes, AvailableBytes    int64
	TotalInodes, UsedInodes, AvailableInodes int64 // 0 for a disk: they are its consumer's affair
}

// Stats measures a volume where it is staged or published. It is ErrNotFound if
// it is not there.
func (m *Manager) Stats(id, path string) (Usage, error) {
	if err := CheckID(id); err != nil {
		return Usage{}, err
	}
	img, err := m.open(id)
	if err != nil {
		return Usage{}, err
	}
	defer img.Close()
	rel, err := m.shownAt(img, path)
	if err != nil {
		return Usage{}, fmt.Errorf("measuring volume %s: %w", id, err)
	}
	m.refill(img)
	switch img.Mode {
	case ModeDiskImage:
		return imageUsage(img)
	case ModeBlock:
		return Usage{TotalBytes: img.Spec.Size}, nil
	}
	return m.filesystemUsage(rel)
}

// filesystemUsage measures what is mounted at a path.
func (m *Manager) filesystemUsage(rel string) (Usage, error) {
	root, err := m.openMounted(rel)
	if err != nil {
		return Usage{}, err
	}
	defer root.Close()
	var st syscall.Statfs_t
	if err := syscall.Fstatfs(int(root.Fd()), &st); err != nil {
		return Usage{}, &os.PathError{Op: "fstatfs", Path: root.Name(), Err: err}
	}
	return Usage{
		TotalBytes:      int64(st.Blocks) * st.Bsize,
		UsedBytes:       int64(st.Blocks-st.Bfree) * st.Bsize,
		AvailableBytes:  int64(st.Bavail) * st.Bsize,
		TotalInodes:     int64(st.Files),
		UsedInodes:      int64(st.Files - st.Ffree),
		AvailableInodes: int64(st.Ffree),
	}, nil
}

// refill reserves again what of a thick volume has lost its space: the kernel
// writes zeros to a loop device by punching holes, as ext4 has it do. A full pool
// is no reason for a volume not to be used. Kubelet asks for its figures every
// minute.
func (m *Manager) refill(img *image) {
	if !img.Thick {
		return
	}
	if taken, err := allocated(img.File); err != nil || taken >= img.Spec.Size {
		return
	}
	if err := sparse.Reserve(img.File, img.Spec.Size); err != nil {
		klog.ErrorS(err, "Reserving space again that a thick volume has lost", "volume", img.ID)
	}
}

// imageUsage measures the image file: what a VM sees of it is not ours to read.
func imageUsage(img *image) (Usage, error) {
	used, err := allocated(img.File)
	if err != nil {
		return Usage{}, err
	}
	// The size it was made with: a pod may have grown the file.
	return Usage{TotalBytes: img.Spec.Size, UsedBytes: used, AvailableBytes: max(0, img.Spec.Size-used)}, nil
}
