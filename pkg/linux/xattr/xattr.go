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
// Sources: xattr(7), fsetxattr(2), fgetxattr(2), lgetxattr(2), fremovexattr(2).
package xattr

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"

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
	value, err := get(size, func(value []byte) (n int, err error) {
		err = sys.On(f, func(fd int) (err error) {
			n, err = unix.Fgetxattr(fd, name, value)
			return err
		})
		return n, err
	})
	return value, explain("fgetxattr", f, name, err)
}

// GetAt is [Get] for a file in an open directory, which it does not open: that takes a third of
// the time. file may have several components. A symbolic link as its last one is not followed.
//
// "lgetxattr() is identical to getxattr(), except in the case of a symbolic link, where the
// link itself is interrogated, not the file that it refers to." lgetxattr(2). The directory is
// found by /proc/self/fd, since getxattrat(2) is of Linux 6.13.
func GetAt(dir *os.File, file, name string, size int) ([]byte, error) {
	value, err := get(size, func(value []byte) (n int, err error) {
		err = sys.On(dir, func(fd int) (err error) {
			n, err = unix.Lgetxattr("/proc/self/fd/"+strconv.Itoa(fd)+"/"+file, name, value)
			return err
		})
		return n, err
	})
	if err != nil {
		return nil, &os.PathError{Op: "lgetxattr " + name, Path: filepath.Join(dir.Name(), file), Err: err}
	}
	return value, nil
}

// usual is more than most values have, in bytes.
const usual = 1 << 10

// get reads a value into a buffer of the usual size, or else into one of the given size.
func get(size int, read func(value []byte) (int, error)) ([]byte, error) {
	value := make([]byte, min(size, usual))
	n, err := read(value)
	if errors.Is(err, unix.ERANGE) && size > usual {
		value = make([]byte, size)
		n, err = read(value)
	}
	if err != nil {
		return nil, err
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
