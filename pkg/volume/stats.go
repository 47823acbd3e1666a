// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"fmt"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/fsctl"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Usage is the space and the inodes of a published volume.
type Usage struct {
	TotalBytes, UsedBytes, AvailableBytes    int64
	TotalInodes, UsedInodes, AvailableInodes int64 // 0 for a disk: only its consumer knows them
}

// Stats measures a volume where it is staged or published. A volume that is not at that path
// returns [errdefs.ErrNotFound].
func (m *Manager) Stats(id, path string) (Usage, error) {
	if err := image.CheckID(id); err != nil {
		return Usage{}, err
	}
	img, err := m.images.Open(id)
	if err != nil {
		return Usage{}, err
	}
	defer img.Close()
	rel, err := m.root.Locate(img, path)
	if err != nil {
		return Usage{}, fmt.Errorf("measuring volume %s: %w", id, err)
	}
	m.images.Refill(img)
	switch img.Mode() {
	case image.ModeDiskImage:
		return diskUsage(img)
	case image.ModeBlock:
		return Usage{TotalBytes: img.Record.Spec.Size}, nil
	}
	return m.filesystemUsage(rel)
}

// filesystemUsage measures the filesystem that is mounted at a path.
func (m *Manager) filesystemUsage(rel string) (Usage, error) {
	root, err := m.root.OpenMounted(rel)
	if err != nil {
		return Usage{}, err
	}
	defer root.Close()
	st, err := fsctl.StatusOf(root)
	if err != nil {
		return Usage{}, err
	}
	return Usage{
		TotalBytes: st.Total, UsedBytes: st.Used, AvailableBytes: st.Available,
		TotalInodes: st.Inodes, UsedInodes: st.Inodes - st.FreeInodes, AvailableInodes: st.FreeInodes,
	}, nil
}

// diskUsage measures the image file. The plugin does not read what a VM has put inside.
func diskUsage(img *image.Image) (Usage, error) {
	used, err := img.Allocated()
	if err != nil {
		return Usage{}, err
	}
	// Use the size in the record: a pod may have enlarged the file.
	total := img.Record.Spec.Size
	return Usage{TotalBytes: total, UsedBytes: used, AvailableBytes: max(0, total-used)}, nil
}
