// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package xattr reads and writes the extended attributes of open files.
//
// An attribute stays with its inode, whatever name the file has, and a file without
// a name can have attributes too. A value is replaced as a whole: no reader sees half of it.
//
// Caveats: an attribute is not durable before the file's own fsync. Whoever may
// write a file may also change its "user." attributes. The "trusted." ones take
// CAP_SYS_ADMIN.
//
// Sources: xattr(7), fsetxattr(2), fgetxattr(2), fremovexattr(2).
package xattr

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-disktemplate/csi-disktemplate/pkg/linux/internal/sys"
)

// Set gives f the attribute, or replaces its value.
//
// "By default (i.e., flags is zero), the extended attribute will be created if it
// does not exist, or the value will be replaced if the attribute already exists."
// fsetxattr(2)
func Set(f *os.File, name string, value []byte) error {
	err := sys.Effect("fsetxattr", f, func(fd int) error { return unix.Fsetxattr(fd, name, value, 0) })
	return explain("fsetxattr", f, name, err)
}

// Get returns the value of an attribute of at most size bytes. A longer value
// returns [syscall.ERANGE], and an attribute that does not exist [syscall.ENODATA].
//
// "ERANGE: The size of the value buffer is too small to hold the result." fgetxattr(2)
func Get(f *os.File, name string, size int) ([]byte, error) {
	value := make([]byte, size)
	var n int
	err := sys.On(f, func(fd int) (err error) {
		n, err = unix.Fgetxattr(fd, name, value)
		return err
	})
	if err != nil {
		return nil, explain("fgetxattr", f, name, err)
	}
	return value[:n], nil
}

// Remove makes sure that f does not have the attribute.
//
// "ENODATA: The named attribute does not exist." fremovexattr(2)
func Remove(f *os.File, name string) error {
	err := sys.Effect("fremovexattr", f, func(fd int) error { return unix.Fremovexattr(fd, name) })
	if errors.Is(err, unix.ENODATA) {
		return nil
	}
	return explain("fremovexattr", f, name, err)
}

func explain(call string, f *os.File, name string, err error) error {
	if err == nil {
		return nil
	}
	return &os.PathError{Op: call + " " + name, Path: f.Name(), Err: err}
}
