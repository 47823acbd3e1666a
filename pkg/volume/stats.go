// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package volume

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Usage is what a published volume has and uses.
type Usage struct {
	TotalBytes, UsedBytes, AvailableBytes    int64
	TotalInodes, UsedInodes, AvailableInodes int64 // 0 for a disk image: they are the guest's affair
}

// Stats measures a volume where it is published. It is ErrNotFound if it is not
// published there.
func (m *Manager) Stats(id, path string) (Usage, error) {
	if err := CheckID(id); err != nil {
		return Usage{}, err
	}
	rel, err := m.relative(path)
	if err != nil {
		return Usage{}, err
	}
	img, err := m.open(id)
	if err != nil {
		return Usage{}, err
	}
	defer img.Close()
	at, err := m.look(rel)
	if err != nil && !errors.Is(err, ErrInvalid) {
		return Usage{}, err
	}
	if !at.mounted {
		return Usage{}, fmt.Errorf("%w: volume %s is not published at %q (it is meant for %q)", ErrNotFound, id, path, img.Target)
	}
	if _, err := m.shown(img, rel); errors.Is(err, errForeign) {
		return Usage{}, fmt.Errorf("%w: %w", ErrNotFound, err)
	} else if err != nil {
		return Usage{}, err
	}
	if img.Mode == ModeDiskImage {
		return imageUsage(img)
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(path, &st); err != nil {
		return Usage{}, &os.PathError{Op: "statfs", Path: path, Err: err}
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

// imageUsage measures the image file: what a VM sees of it is not ours to read.
func imageUsage(img *image) (Usage, error) {
	fi, err := img.Stat()
	if err != nil {
		return Usage{}, err
	}
	// The size it was made with: a pod may have grown the file.
	used := fi.Sys().(*syscall.Stat_t).Blocks * 512
	return Usage{TotalBytes: img.Spec.Size, UsedBytes: used, AvailableBytes: max(0, img.Spec.Size-used)}, nil
}
