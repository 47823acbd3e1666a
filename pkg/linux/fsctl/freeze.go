// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

package fsctl

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// ErrFrozen means that the filesystem was frozen before.
var ErrFrozen = errors.New("the filesystem is frozen already")

const (
	fiFreeze = 0xc0045877 // _IOWR('X', 119, int), linux/fs.h
	fiThaw   = 0xc0045878 // _IOWR('X', 120, int)
)

// Sync writes everything that is dirty in f's filesystem to its disk, and commits it. On
// btrfs the commit also frees the space of files that were deleted a moment ago.
//
// "syncfs() is like sync(), but synchronizes just the filesystem containing file
// referred to by the open file descriptor fd." syncfs(2)
func Sync(f *os.File) error {
	if err := sys.Effect("syncfs", f, unix.Syncfs); err != nil {
		return fmt.Errorf("syncfs %s: %w", f.Name(), err)
	}
	return nil
}

// Freeze writes everything out and makes all further writers wait until [Thaw]. It
// returns [ErrFrozen] if the filesystem is frozen already.
func Freeze(f *os.File) error {
	err := ioctl("FIFREEZE", f, fiFreeze)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("%w: FIFREEZE %s: %w", ErrFrozen, f.Name(), err)
	}
	if err != nil {
		return fmt.Errorf("FIFREEZE %s: %w", f.Name(), err)
	}
	return nil
}

// Thaw lets writers go on. On a filesystem that is not frozen it does nothing.
func Thaw(f *os.File) error {
	err := ioctl("FITHAW", f, fiThaw)
	if errors.Is(err, unix.EINVAL) { // thaw_super() in fs/super.c: it is not frozen
		return nil
	}
	if err != nil {
		return fmt.Errorf("FITHAW %s: %w", f.Name(), err)
	}
	return nil
}

func ioctl(name string, f *os.File, request uint) error {
	return sys.Effect(name, f, func(fd int) error { return unix.IoctlSetInt(fd, request, 0) })
}
