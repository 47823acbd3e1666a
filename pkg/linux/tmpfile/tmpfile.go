// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package tmpfile makes files that have no name until they are whole.
//
// A file from [Create] vanishes with its last descriptor, however the process
// ends. [Link] gives it its name at once and never replaces an existing file.
//
// Caveat: neither makes anything durable. For a name that survives a power cut
// sync the file, link it, then [SyncDir] its directory, in this order.
//
// Sources: O_TMPFILE in open(2), AT_SYMLINK_FOLLOW with /proc/self/fd in
// linkat(2), fsync(2).
package tmpfile

import (
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
