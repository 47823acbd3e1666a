// Copyright The csi-disktemplate Authors.
// SPDX-License-Identifier: Apache-2.0

// Package memfile makes files that live in memory and have no name, to be
// handed to a child as descriptors.
//
// Source: memfd_create(2).
package memfile

import (
	"os"

	"golang.org/x/sys/unix"
)

// New returns a file with the given content; name is for /proc only. It is gone
// with its last descriptor.
func New(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(content, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
