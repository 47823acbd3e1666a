// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/openat"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/quota"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/logs"
)

// A bounded file is alone in a project of xfs, whose hard limit is its bound. The project's
// number follows from the file's inode number, so nothing has to be remembered, and it is free
// again with the inode.

// ErrProjectTaken means that a file cannot be bounded, since other files are in its project.
var ErrProjectTaken = errors.New("the project is taken")

// firstProject is above the numbers that others give to projects: container runtimes and kubelet
// count from 1, 200000 or 1048577.
const firstProject, projects = 1 << 31, 1<<31 - 1

// projectOf is the project of a file that is bounded. Inode numbers of large filesystems have
// more than 31 bits, so two files may have the same one.
func projectOf(f *os.File) (uint32, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return uint32(firstProject + fi.Sys().(*syscall.Stat_t).Ino%projects), nil
}

// CanBound reports whether the kernel bounds files of the pool: whether the pool is on an xfs that
// was mounted with prjquota. A pool whose directory is in a project of its administrator has the
// bound of that one, and its files stay in it.
func (p *Pool) CanBound() (bool, error) {
	if on, err := quota.Enforced(p.dir); err != nil || !on {
		return false, err
	}
	dir, err := openat.Open(p.dir, volumesDir, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return false, err
	}
	defer dir.Close()
	inherited, err := quota.Project(dir)
	return inherited == 0, err
}

// Bound makes the kernel refuse blocks to a file beyond so many bytes, or moves the bound that it
// has. [Pool.CanBound] must hold. It returns [ErrProjectTaken] for a file that it must leave
// without a bound.
func (p *Pool) Bound(f *os.File, bytes int64) error {
	id, err := projectOf(f)
	if err != nil {
		return err
	}
	was, err := quota.Project(f)
	if err != nil {
		return err
	}
	if was != id {
		if err := quota.SetProject(f, id); err != nil {
			return Full(err)
		}
	}
	is, err := quota.Get(f, id)
	if err != nil {
		return err
	}
	if was != id && is.Files > 1 {
		err := fmt.Errorf("%w: project %d of xfs has %d files besides %s", ErrProjectTaken, id, is.Files-1, f.Name())
		return errors.Join(err, quota.SetProject(f, 0))
	}
	if is.Limit == bytes {
		return nil
	}
	return Full(quota.SetLimit(f, id, bytes))
}

// Bounded reports whether a file is in its project. Whoever owns the file can move it to another.
func (p *Pool) Bounded(f *os.File) (bool, error) {
	id, err := projectOf(f)
	if err != nil {
		return false, err
	}
	is, err := quota.Project(f)
	return is == id, err
}

// boundOf returns the project of a volume's image if it is bounded, and 0 if it is not.
func (p *Pool) boundOf(name string) uint32 {
	if on, err := p.CanBound(); err != nil || !on {
		return 0
	}
	f, err := p.OpenVolume(name)
	if err != nil {
		return 0
	}
	defer f.Close()
	if bounded, err := p.Bounded(f); err != nil || !bounded {
		return 0
	}
	id, err := projectOf(f)
	if err != nil {
		return 0
	}
	return id
}

// unbound drops the bound of an image that was removed, so that the filesystem forgets its project.
// One that a crash leaves does no harm: a file gets its bound anew before a pod has it, and other
// files are in no project.
func (p *Pool) unbound(id uint32) {
	if id == 0 {
		return
	}
	if err := quota.SetLimit(p.dir, id, 0); err != nil {
		logs.Warn("The limit of a disk.img that was deleted stays behind, which does no harm", "err", err, "project", id)
	}
}
