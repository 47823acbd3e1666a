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
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/internal/failpoint"
	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Create opens a new unnamed file for reading and writing on dir's filesystem.
func Create(dir string, perm os.FileMode) (*os.File, error) {
	f, err := sys.Open(filepath.Join(dir, "(unnamed)"), func() (int, error) {
		if err := failpoint.Before("open O_TMPFILE"); err != nil {
			return 0, err
		}
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
	err := failpoint.Before("linkat")
	if err == nil {
		err = unix.Linkat(unix.AT_FDCWD, self, unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	}
	if err != nil {
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
	if err := Sync(f); err != nil {
		return err
	}
	if err := Link(f, path); err != nil {
		return err
	}
	if err := Sync(f); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Replace gives f, durably, the name that another file has, which loses it. For a
// moment f has a name beside it, that begins with '.'; what a process left there
// that died in this moment is replaced by the next.
func Replace(f *os.File, path string) error {
	beside := Beside(path)
	if err := Remove(beside); err != nil {
		return err
	}
	err := Publish(f, beside)
	if err == nil {
		err = failpoint.Before("rename")
	}
	if err == nil {
		err = os.Rename(beside, path)
	}
	if err != nil {
		return errors.Join(err, Remove(beside)) // if it came so far
	}
	return SyncDir(filepath.Dir(path))
}

const besidePrefix, besideSuffix = ".", ".new"

// Beside is the name that [Replace] gives its file for a moment.
func Beside(path string) string {
	return filepath.Join(filepath.Dir(path), besidePrefix+filepath.Base(path)+besideSuffix)
}

// Replaces returns the name beside which a name stands, if it is one of [Beside].
func Replaces(beside string) (name string, ok bool) {
	name, ok = strings.CutPrefix(beside, besidePrefix)
	if !ok {
		return "", false
	}
	name, ok = strings.CutSuffix(name, besideSuffix)
	return name, ok && name != ""
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := Sync(d); err != nil {
		return fmt.Errorf("fsync of directory: %w", err)
	}
	return nil
}

// Sync is fsync(2).
func Sync(f *os.File) error {
	if err := failpoint.Before("fsync"); err != nil {
		return &os.PathError{Op: "fsync", Path: f.Name(), Err: err}
	}
	return f.Sync()
}

// Remove takes a name away, if it is there.
func Remove(path string) error {
	if err := failpoint.Before("unlink"); err != nil {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
