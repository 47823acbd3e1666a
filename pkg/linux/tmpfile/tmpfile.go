// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tmpfile makes files that have no name until they are whole.
//
// A file from [Create] vanishes with its last descriptor, however the process
// ends. [Link] gives it its name at once and never replaces an existing file.
//
// Caveat: neither makes anything durable. [Publish] does: after it, file and name
// survive a power cut.
//
// Sources: O_TMPFILE in open(2), AT_SYMLINK_FOLLOW with /proc/self/fd in
// linkat(2), fsync(2).
package tmpfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Create opens a new unnamed file for reading and writing on dir's filesystem.
func Create(dir string, perm os.FileMode) (*os.File, error) {
	f, err := sys.Open(filepath.Join(dir, "(unnamed)"), func() (int, error) {
		return unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, uint32(perm.Perm()))
	})
	if err != nil {
		return nil, &os.PathError{Op: "open O_TMPFILE", Path: dir, Err: err}
	}
	return f, nil
}

// Link names f. If the name exists the error is [os.ErrExist], and what is
// there stays untouched.
func Link(f *os.File, path string) error {
	self := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	if err := unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW); err != nil {
		return &os.LinkError{Op: "linkat", Old: f.Name(), New: path, Err: err}
	}
	return nil
}

// Publish names f like [Link], and makes file and name durable. After an error
// the name may be there or not.
//
// The file is synced twice. Before: so that what has a name is whole, where the
// filesystem orders the name behind the data (xfs). After: because btrfs logs
// nothing of an inode without a name (btrfs_log_inode_parent in
// fs/btrfs/tree-log.c), and would log one that only got its name as empty.
func Publish(f *os.File, path string) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := Link(f, path); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Replace gives f, durably, the name that another file has, which loses it. For a
// moment f has a name beside it, that begins with '.'; what a process left there
// that died in this moment is replaced by the next.
func Replace(f *os.File, path string) error {
	beside := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new")
	if err := os.Remove(beside); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	err := Publish(f, beside)
	if err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		os.Remove(beside) // if it came so far
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("fsync of directory: %w", err)
	}
	return nil
}
