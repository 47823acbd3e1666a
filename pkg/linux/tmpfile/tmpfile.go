// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tmpfile makes files that have no name until they are complete.
//
// A file from [Create] vanishes with its last descriptor, however the process
// ends. [Link] gives it its name in one step and never replaces an existing file.
//
// Caveat: neither makes anything durable. [Publish] does: after it, file and name
// survive a power cut.
//
// Sources: O_TMPFILE in open(2), AT_SYMLINK_FOLLOW with /proc/self/fd in
// linkat(2), rename(2), unlink(2), fsync(2).
package tmpfile

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Create opens a new unnamed file for reading and writing on dir's filesystem. In errors it is
// called "unnamed file in DIR".
//
// "O_TMPFILE (since Linux 3.11): Create an unnamed temporary regular file." open(2)
func Create(dir string, perm os.FileMode) (*os.File, error) {
	f, err := sys.OpenEffect("open O_TMPFILE", "unnamed file in "+dir, func() (int, error) {
		return unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, uint32(perm.Perm()))
	})
	if err != nil {
		return nil, &os.PathError{Op: "open O_TMPFILE", Path: dir, Err: err}
	}
	return f, nil
}

// Link gives f a name. If the name exists the error is [os.ErrExist], and the file that
// has it stays untouched.
//
// "If O_EXCL is not specified, then linkat(2) can be used to link the temporary file
// into the filesystem, making it permanent" O_TMPFILE in open(2). The link goes through
// /proc/self/fd, since AT_EMPTY_PATH takes CAP_DAC_READ_SEARCH.
func Link(f *os.File, path string) error {
	err := sys.Effect("linkat", f, func(fd int) error {
		return unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	})
	if err != nil {
		return &os.PathError{Op: "linkat", Path: path, Err: err}
	}
	return nil
}

// Publish gives f a name as [Link] does, and makes file and name durable. After an error
// the name may exist or not.
//
// The file is synced twice. The first sync makes sure that a file with a name is
// complete, where the filesystem orders the name after the data (xfs). The second is for
// the name, and for btrfs: it logs nothing of an inode without a name (btrfs_log_inode_parent in
// fs/btrfs/tree-log.c), and would log an inode that has only just got its name as empty.
//
// On ext4, xfs and btrfs that second sync makes the name durable. The former two change file and
// directory in one transaction (ext4_link, xfs_link), and btrfs logs all names of an inode that was
// linked (BTRFS_INODE_COPY_EVERYTHING in btrfs_link). On any other filesystem [SyncDir] must follow.
func Publish(f *os.File, path string) error {
	if err := Sync(f); err != nil {
		return err
	}
	return PublishSynced(f, path)
}

// PublishSynced is [Publish] for a file whose content was synced before. What was written to its
// attributes since need not be: filesystems that order the name after the data order it after
// these too.
func PublishSynced(f *os.File, path string) error {
	if err := Link(f, path); err != nil {
		return err
	}
	return Sync(f)
}

// Replace gives f the name of another file, which loses it, and makes that durable. Until
// then f has the name [Beside] path. If a process died during this, the next Replace removes
// the file that it left there.
func Replace(f *os.File, path string) error {
	beside := Beside(path)
	if err := Remove(beside); err != nil {
		return err
	}
	err := Publish(f, beside)
	if err == nil {
		err = sys.PathEffect("rename", func() error { return os.Rename(beside, path) })
	}
	if err != nil {
		return errors.Join(err, Remove(beside)) // it may not exist
	}
	return SyncDir(filepath.Dir(path))
}

const besidePrefix, besideSuffix = ".", ".new"

// Beside is the name that [Replace] gives its file for a moment. It begins with '.'.
func Beside(path string) string {
	return filepath.Join(filepath.Dir(path), besidePrefix+filepath.Base(path)+besideSuffix)
}

// Replaces undoes [Beside]: it returns the name of the file that is to be replaced. ok
// tells whether beside is such a name.
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
		return fmt.Errorf("sync the directory: %w", err)
	}
	return nil
}

// Sync makes f's content durable.
//
// "fsync() transfers ("flushes") all modified in-core data of (i.e., modified buffer
// cache pages for) the file referred to by the file descriptor fd to the disk device"
// fsync(2)
func Sync(f *os.File) error {
	if err := sys.Effect("fsync", f, unix.Fsync); err != nil {
		return &os.PathError{Op: "fsync", Path: f.Name(), Err: err}
	}
	return nil
}

// Remove makes sure that no file and no empty directory has the name.
//
// "unlink() deletes a name from the filesystem." unlink(2), and rmdir(2)
func Remove(path string) error {
	err := sys.PathEffect("unlink", func() error {
		err := unix.Unlink(path)
		if err == unix.EISDIR {
			err = unix.Rmdir(path)
		}
		return err
	})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}
