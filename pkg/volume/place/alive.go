// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/errdefs"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/volume/image"
)

// Vitality is whether a mounted filesystem still does its work. After an error the kernel
// makes it give up, and it stays so until its last mount is gone.
type Vitality int

// The states of a mounted filesystem.
const (
	Alive    Vitality = iota
	ReadOnly          // it can be read; the mount itself may be writable
	ShutDown          // it returns EIO
)

// Vitality looks at the filesystem of a mount that [Root.Identify] found at a path. If it was
// unmounted meanwhile, the directory below is [Alive].
func (r *Root) Vitality(m Mount, rel string) (Vitality, error) {
	at, err := r.OpenDir(rel)
	if err != nil {
		if errors.Is(err, syscall.EIO) {
			return ShutDown, nil
		}
		return Alive, err
	}
	defer at.Close()
	return vitality(at, m.options)
}

// VitalityOf is [Root.Vitality] of a mount that was just attached. root is its root, open with
// O_PATH.
func VitalityOf(root *os.File) (Vitality, error) {
	info, err := mount.Of(root)
	if err != nil {
		return Alive, err
	}
	if info == nil {
		return Alive, fmt.Errorf("%w: %s was unmounted meanwhile; try again", errdefs.ErrState, root.Name())
	}
	return vitality(root, info.Options)
}

// vitality looks at a filesystem by its root and its options in the mount table.
//
// A shut-down ext4 has an option there. A shut-down xfs has none, but returns
// EIO when its root is read, while statfs(2) still works. A filesystem that became read-only
// has "ro" or, for ext4 on newer kernels, "emergency_ro" among the options of its superblock.
// The plugin never mounts one with "ro": see [mount.Attr].
func vitality(root *os.File, options string) (Vitality, error) {
	has := mount.SplitOptions(options)
	if slices.Contains(has, "shutdown") {
		return ShutDown, nil
	}
	if err := read(root); errors.Is(err, syscall.EIO) {
		return ShutDown, nil
	} else if err != nil {
		return Alive, err
	}
	if slices.Contains(has, "ro") || slices.Contains(has, "emergency_ro") {
		return ReadOnly, nil
	}
	return Alive, nil
}

// read reads an entry of a directory.
func read(at *os.File) error {
	dir, err := mount.Open(at)
	if err != nil {
		return err
	}
	defer dir.Close()
	// An empty directory returns io.EOF.
	if _, err := dir.Readdirnames(1); errors.Is(err, syscall.EIO) {
		return err
	}
	return nil
}

// AllMountpoints are the paths where a volume with these loop devices is mounted, below the
// root or not, as the mount table of this process spells them.
func AllMountpoints(v Owner, loops []int) ([]string, error) {
	t, err := ReadTable()
	if err != nil {
		return nil, err
	}
	return t.Of(image.Record{ID: v.ID(), Mode: v.Mode()}, loops), nil
}
