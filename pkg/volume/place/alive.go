// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package place

import (
	"errors"
	"slices"
	"strings"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/mount"
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
//
// A shut-down ext4 has an option in the mount table. A shut-down xfs has none, but returns
// EIO when its root is read, while statfs(2) still works. A filesystem that became read-only
// has "ro" or, for ext4 on newer kernels, "emergency_ro" among the options of its superblock.
// The plugin never mounts one with "ro": see [mount.Attr].
func (r *Root) Vitality(m Mount, rel string) (Vitality, error) {
	options := strings.Split(m.options, ",")
	if slices.Contains(options, "shutdown") {
		return ShutDown, nil
	}
	if err := r.read(rel); errors.Is(err, syscall.EIO) {
		return ShutDown, nil
	} else if err != nil {
		return Alive, err
	}
	if slices.Contains(options, "ro") || slices.Contains(options, "emergency_ro") {
		return ReadOnly, nil
	}
	return Alive, nil
}

// read reads an entry of a directory.
func (r *Root) read(rel string) error {
	at, err := r.OpenDir(rel)
	if err != nil {
		return err
	}
	defer at.Close()
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
